"""Teachers give the log-probabilities of sampled tokens: in this process, served, or several."""

#: Value of `teacher.server_type` -> how such servers are asked, as "module:class".
SERVER_TYPES = {
    "vllm": "poweropd.teachers.protocols:Vllm",
    "sglang": "poweropd.teachers.protocols:SGLang",
    "llama_cpp": "poweropd.teachers.protocols:LlamaCpp",
}
