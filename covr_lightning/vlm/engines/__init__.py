"""What answers for the VLM: the weights in this process, vLLM in this process, or a vLLM server."""
