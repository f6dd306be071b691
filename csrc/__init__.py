"""Native kernels behind a plain C ABI."""
