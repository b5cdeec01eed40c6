// cuda_cases.h - what the kernels of native/cuda must give, as cases that run through the table of api.h: on the CPU behind cuda_on_cpu.h (test_cuda) and
// on a GPU (cuda_device_tests).
#pragma once

#include "cuda_attention_cases.h"
#include "cuda_cache_cases.h"
#include "cuda_pack_cases.h"
