#define QC_BITS 4
#include "hopper_instances.cuh"
