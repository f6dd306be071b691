#define QC_BITS 2
#include "decode_instances.cuh"
