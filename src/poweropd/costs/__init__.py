"""What a step costs, computed: geometries of models, FLOPs, bytes. No model is loaded."""
