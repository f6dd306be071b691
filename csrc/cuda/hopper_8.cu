#define QC_BITS 8
#include "hopper_instances.cuh"
