#define QC_BITS 3
#include "decode_instances.cuh"
