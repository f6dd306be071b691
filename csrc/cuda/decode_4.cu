#define QC_BITS 4
#include "decode_instances.cuh"
