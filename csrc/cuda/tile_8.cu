#define QC_BITS 8
#include "tile_instances.cuh"
