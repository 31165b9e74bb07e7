"""What files of exported adapters are called. No torch here."""

DIFFUSERS = "pytorch_lora_weights.safetensors"
PEFT = "adapter_model.safetensors"
"""For the families whose adapters diffusers has no loader for."""
