#include "device/mma.cuh"
