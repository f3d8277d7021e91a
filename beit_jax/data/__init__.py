"""Reading data: sources by name, decoding, batches that are a pure function of (seed, step).

Nothing here imports TensorFlow. `python -m beit_jax.data` prepares and checks datasets.
"""
