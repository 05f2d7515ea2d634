"""Which kernels compute on a CPU. `portable`: the same ones on every x86-64 CPU with AVX2 and FMA, so that all of them
give the same bytes. `native`: the fastest ones of this type of CPU. docs/REPRODUCIBILITY.md says what is promised."""
