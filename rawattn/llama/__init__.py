"""Language models of the LLaMA architecture around rawattn: what examples/generate.py and `rawattn check --model` run.

LLaMA, Mistral and Qwen2 from GGUF or safetensors files, on CuPy or NumPy. It needs the extra `examples` and is no part of `import rawattn`.
"""
