#include "pipeline.cuh"
