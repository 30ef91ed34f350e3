"""One file per kernel: what is fused, the reference, the kernels, their launchers, the public function."""
