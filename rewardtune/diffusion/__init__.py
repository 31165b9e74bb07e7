"""Denoising with gradients: parameterisations, rollouts, LoRA and export of diffusion pipelines."""
