/* Preloaded, it has MKL compute with the kernels that it has for Intel's processors on one of
   another maker too, where it otherwise takes others and ignores MKL_ENABLE_INSTRUCTIONS. */
int mkl_serv_intel_cpu_true(void) { return 1; }
int mkl_serv_intel_cpu(void) { return 1; }
