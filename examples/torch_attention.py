"""Attention in a torch program: eager, under torch.compile, and as the attention of a Hugging Face model where transformers is installed.

python examples/torch_attention.py
"""

import torch

import rawattn.torch

device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"on {torch.cuda.get_device_name()}" if device == "cuda" else "no GPU: CPU tensors, computed by the float64 reference")

torch.manual_seed(0)
qkv = torch.randn(2, 100, 3, 4, 64, dtype=torch.bfloat16, device=device)
q, k, v = qkv.unbind(2)  # slices of a packed array are used where they lie


def block(q, k, v):
    return rawattn.torch.attention(q * 0.5, k, v, causal=True) + 1


with torch.inference_mode():
    eager = block(q, k, v)
    compiled = torch.compile(block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")(q, k, v)
print("compiled differs from eager by at most", (compiled - eager).abs().max().item())
assert torch.allclose(compiled, eager, atol=2e-2)

try:
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError:
    print("transformers is not installed: no model")
else:
    rawattn.torch.use_in_transformers()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50)).to(device, torch.bfloat16).eval()
    model.set_attn_implementation("rawattn")
    tokens = model.generate(torch.tensor([[3, 1, 4, 1, 5]], device=device), max_new_tokens=8, do_sample=False, pad_token_id=0)
    print("generated", tokens.tolist())
