"""Pictures and pages of runs; reads run directories only."""
