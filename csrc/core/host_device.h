// BSGAP_HD marks functions that GPU kernels call too; they use no library beyond <cmath>.
#pragma once

#ifdef __CUDACC__
#define BSGAP_HD __host__ __device__
#else
#define BSGAP_HD
#endif
