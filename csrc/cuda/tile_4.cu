#define QC_BITS 4
#include "tile_instances.cuh"
