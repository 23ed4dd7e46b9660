// Columns of the device table that describes every matrix of a grouped launch; the same names in the same
// order as bsgap_kernels/triton/table.py, which says what each means.
#pragma once

#include <cstdint>

namespace bsgap::cuda {

enum TableColumn : int64_t {
  kFirstItem,
  kFirstMatrix,
  kCount,
  kOffset,
  kStrideBatch,
  kSide,
  kOuter,
  kInner,
  kStrideOuter,
  kStrideInner,
  kStrideSide,
  kSplits,
  kFirstGram,
  kFirstPartial,
  kLayout,
  kFirstResult,
  kRoundings,
  kObservations,
  kFeatures,
  kFirstVector,
  kTableColumns
};

}  // namespace bsgap::cuda
