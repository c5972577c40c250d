"""Knowledge distillation via the Target-aware Transformer, in JAX and Flax."""
