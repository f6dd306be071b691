#define QC_BITS 8
#include "decode_instances.cuh"
