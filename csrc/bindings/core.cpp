// bsgap_kernels._core: the torch-free numerics for NumPy arrays. Also where they are tested: the error
// terms of a certificate can be switched off here and nowhere else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "core/ceilings.h"
#include "core/counts.h"
#include "core/lanes.h"
#include "core/probe.h"

namespace py = pybind11;

namespace {

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

[[noreturn]] void fail(const std::string& message) { throw py::value_error(message); }

int64_t square_side(const Array& g) {
  if (g.ndim() != 2 || g.shape(0) != g.shape(1))
    fail("G must be a square matrix, got " + std::to_string(g.ndim()) + " dimensions");
  return g.shape(0);
}

bsgap::MatrixView view_of(const py::array& a) {
  if (a.ndim() != 2) fail("A must have 2 dimensions, got " + std::to_string(a.ndim()));
  bsgap::MatrixView v;
  const char kind = a.dtype().kind();
  const auto size = a.itemsize();
  if (kind == 'f' && size == 8) {
    v.dtype = bsgap::DType::kFloat64;
  } else if (kind == 'f' && size == 4) {
    v.dtype = bsgap::DType::kFloat32;
  } else if (kind == 'f' && size == 2) {
    v.dtype = bsgap::DType::kFloat16;
  } else {
    throw py::type_error("A must be float64, float32 or float16, got " + std::string(py::str(a.dtype())));
  }
  if (a.dtype().byteorder() == '>' || !(a.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) ||
      a.strides(0) % size != 0 || a.strides(1) % size != 0)
    fail("A must be aligned, in native byte order, with strides that are multiples of its item size");
  v.data = a.data();
  v.rows = a.shape(0);
  v.cols = a.shape(1);
  v.row_stride = a.strides(0) / size;
  v.col_stride = a.strides(1) / size;
  return v;
}

bsgap::Threshold threshold(double atol, double rtol) {
  if (!(atol >= 0)) fail("atol must be a non-negative number, got " + std::to_string(atol));
  if (!(rtol >= 0)) fail("rtol must be a non-negative number, got " + std::to_string(rtol));
  return {atol, rtol};
}

bsgap::ErrorTerms error_terms(const std::vector<std::string>& without) {
  bsgap::ErrorTerms terms;
  for (const std::string& name : without) {
    if (name == "gram") {
      terms.gram = false;
    } else if (name == "ldlt") {
      terms.ldlt = false;
    } else if (name == "shift") {
      terms.shift = false;
    } else if (name == "spectral_norm") {
      terms.spectral_norm = false;
    } else if (name == "underflow") {
      terms.underflow = false;
    } else {
      fail("without: unknown error term '" + name +
           "', expected gram, ldlt, shift, spectral_norm or underflow");
    }
  }
  return terms;
}

py::tuple near_rank_interval(const py::array& a, double atol, double rtol, bool center,
                             const std::string& mode, uint64_t seed) {
  const bsgap::MatrixView v = view_of(a);
  bsgap::Threshold t = threshold(atol, rtol);
  if (mode != "rigorous" && mode != "probed") fail("mode must be 'rigorous' or 'probed', got '" + mode + "'");
  if (v.rows == 0 || v.cols == 0) return py::make_tuple(0, 0);
  const bool features_side = v.cols <= v.rows;
  const bool probed = mode == "probed" && atol == 0 && rtol >= bsgap::kProbedMinRtol &&
                      std::min(v.rows, v.cols) >= bsgap::kProbedMinSide;
  const auto precision = probed ? bsgap::GramPrecision::kFloat32 : bsgap::GramPrecision::kFloat64;
  bsgap::CertifiedGram r = bsgap::certified_gram(v, features_side, center, precision, bsgap::serial_for);
  if (r.content == bsgap::Content::kNonFinite) return py::make_tuple(-1, -1);
  if (r.content == bsgap::Content::kZero) return py::make_tuple(0, 0);
  if (!(r.rounding_error < bsgap::kInfinity)) bsgap::probe(v, features_side, seed, r, bsgap::serial_for);
  t = bsgap::scaled(t, r.exponent);
  bsgap::CountInterval out;
  bsgap::certified_counts(r.g.data(), r.side, r.error(), &t, 1, &out, bsgap::serial_for);
  return py::make_tuple(out.lower, out.upper);
}

py::dict gram(const py::array& a, bool center, bool observations, bool float32) {
  const bsgap::MatrixView v = view_of(a);
  bsgap::CertifiedGram r = bsgap::certified_gram(
      v, !observations, center, float32 ? bsgap::GramPrecision::kFloat32 : bsgap::GramPrecision::kFloat64,
      bsgap::serial_for);
  py::array_t<double> g({r.side, r.side});
  bsgap::mirror(r.g.data(), r.side, bsgap::serial_for);
  std::copy(r.g.data(), r.g.data() + r.side * r.side, g.mutable_data());
  py::dict result;
  result["gram"] = g;
  result["exponent"] = r.exponent;
  result["frobenius_sq"] = r.frobenius_sq;
  result["rounding_error"] = r.rounding_error;
  result["centring_error"] = r.centring_error;
  return result;
}

py::dict certified_count(const Array& g, double atol, double rtol, double gram_error,
                         const std::vector<std::string>& without,
                         const std::optional<std::vector<double>>& start) {
  const int64_t n = square_side(g);
  if (!(gram_error >= 0)) fail("gram_error must be a non-negative number, got " + std::to_string(gram_error));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j)
      if (g.data()[i * n + j] != g.data()[j * n + i]) fail("G must be symmetric");
  if (start && static_cast<int64_t>(start->size()) != n) fail("start must have one entry per row of G");
  const bsgap::Threshold t = threshold(atol, rtol);
  bsgap::CountInterval out;
  bsgap::CertificateTrace trace;
  bsgap::certified_counts(g.data(), n, gram_error, &t, 1, &out, bsgap::serial_for, error_terms(without),
                          start ? &*start : nullptr, &trace);
  py::dict result;
  result["lower"] = out.lower;
  result["upper"] = out.upper;
  result["largest_eigenvalue"] =
      py::make_tuple(trace.largest_eigenvalue.lower, trace.largest_eigenvalue.upper);
  result["tau_squared"] = py::make_tuple(trace.tau_squared.lower, trace.tau_squared.upper);
  result["error_at_lower"] = trace.error_at_lower;
  result["error_at_upper"] = trace.error_at_upper;
  return result;
}

py::array_t<int64_t> point_counts(const Array& g, const std::vector<double>& rtols) {
  const int64_t n = square_side(g), count = static_cast<int64_t>(rtols.size());
  std::vector<bsgap::Threshold> thresholds;
  for (const double rtol : rtols) thresholds.push_back(threshold(0.0, rtol));
  py::array_t<int64_t> counts(count);
  bsgap::point_counts(g.data(), n, thresholds.data(), count, counts.mutable_data(), bsgap::serial_for);
  return counts;
}

py::dict inertia(const Array& g, double shift) {
  const int64_t n = square_side(g);
  bsgap::Buffer<double> work(n * bsgap::factor_stride(n));
  const bsgap::InertiaCount c = bsgap::count_above(g.data(), n, shift, work.data(), bsgap::serial_for);
  py::dict result;
  result["positive"] = c.positive;
  result["valid"] = c.valid;
  result["factor_error"] = c.factor_error;
  result["shift_error"] = c.shift_error;
  result["underflow_error"] = c.underflow_error;
  return result;
}

// A vector of lanes after the other as rows of a matrix, a lane each.
py::array_t<double> rows_of_lanes(const bsgap::Lanes* lanes, int64_t count, int64_t length) {
  py::array_t<double> result({count, length});
  for (int64_t l = 0; l < count; ++l)
    for (int64_t i = 0; i < length; ++i) result.mutable_data()[l * length + i] = lanes[i][l];
  return result;
}

py::dict lane_spectra(const Array& g, const std::optional<Array>& x) {
  if (g.ndim() != 3 || g.shape(1) != g.shape(2) || g.shape(1) == 0)
    fail("G must be a stack of square matrices, got " + std::to_string(g.ndim()) + " dimensions");
  const int64_t count = g.shape(0), n = g.shape(1), shifts = x && x->ndim() == 2 ? x->shape(1) : 0;
  if (count < 1 || count > bsgap::kLanes)
    fail("G must hold 1 ... " + std::to_string(bsgap::kLanes) + " matrices, got " + std::to_string(count));
  if (x && (x->ndim() != 2 || x->shape(0) != count)) fail("x must have one row per matrix of G");
  const double* matrices[bsgap::kLanes];
  for (int64_t l = 0; l < count; ++l) matrices[l] = g.data() + l * n * n;
  const bsgap::ScopedIeee ieee;
  const bsgap::LaneSpectra spectra(matrices, static_cast<int>(count), n);
  std::vector<bsgap::Lanes> counts(shifts);
  for (int64_t t = 0; t < shifts; ++t) {
    bsgap::Lanes at{};
    for (int64_t l = 0; l < count; ++l) at[l] = x->data()[l * shifts + t];
    counts[t] = spectra.count_above(at);
  }
  const bsgap::Lanes largest = spectra.largest(), scale = spectra.scale();
  py::dict result;
  result["diagonal"] = rows_of_lanes(spectra.diagonal(), count, n);
  result["off_diagonal"] = rows_of_lanes(spectra.off_diagonal(), count, n - 1);
  result["scale"] = rows_of_lanes(&scale, count, 1);
  result["largest"] = rows_of_lanes(&largest, count, 1);
  result["counts"] = rows_of_lanes(counts.data(), count, shifts);
  return result;
}

bsgap::Tridiagonal tridiagonal(const Array& diagonal, const Array& off_diagonal) {
  if (diagonal.ndim() != 1 || off_diagonal.ndim() != 1 || diagonal.size() != off_diagonal.size() + 1)
    fail("diagonal must have one entry more than off_diagonal");
  return {std::vector<double>(diagonal.data(), diagonal.data() + diagonal.size()),
          std::vector<double>(off_diagonal.data(), off_diagonal.data() + off_diagonal.size())};
}

py::array_t<double> probe_vectors(int64_t n, uint64_t seed) {
  const std::vector<double> omega = bsgap::probe_vectors(n, seed);
  py::array_t<double> result({static_cast<int64_t>(bsgap::kProbes), n});
  std::copy(omega.begin(), omega.end(), result.mutable_data());
  return result;
}

double probe_bound(const Array& g, const Array& omega, const Array& y, double product_error) {
  const int64_t n = square_side(g);
  if (omega.ndim() != 2 || omega.shape(0) != bsgap::kProbes || omega.shape(1) != n || y.ndim() != 2 ||
      y.shape(0) != bsgap::kProbes || y.shape(1) != n)
    fail("omega and y must be " + std::to_string(bsgap::kProbes) + " x n");
  return bsgap::probe_bound(g.data(), n, omega.data(), y.data(), product_error, bsgap::serial_for);
}

double fma_rate(const std::string& dtype, double seconds) {
  if (dtype != "float32" && dtype != "float64")
    fail("dtype must be 'float32' or 'float64', got '" + dtype + "'");
  const py::gil_scoped_release release;  // threads of Python measure the cores together
  return dtype == "float32" ? bsgap::fma_rate<float>(seconds) : bsgap::fma_rate<double>(seconds);
}

double read_rate(const py::array& buffer, double seconds) {
  if (!(buffer.flags() & py::array::c_style) || buffer.nbytes() == 0)
    fail("buffer must be contiguous and not empty");
  const char* data = static_cast<const char*>(buffer.data());
  const int64_t bytes = buffer.nbytes();
  const py::gil_scoped_release release;
  return bsgap::read_rate(data, bytes, seconds);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  using namespace pybind11::literals;
  bsgap::instruction_set();  // a wrong BSGAP_ISA is an error of the import, not of some later count
  m.doc() = "Certified singular-value counts of NumPy arrays (float64, float32, float16), without torch.";
  m.def("near_rank_interval", &near_rank_interval, "A"_a, py::kw_only(), "atol"_a = 0.0, "rtol"_a = 1e-2,
        "center"_a = false, "mode"_a = "rigorous", "seed"_a = 0,
        "Bounds (lower, upper) of #{sigma(A) > max(atol, rtol * sigma_max)} that hold for any rounding.\n\n"
        "A: (m, n), read in place. mode: 'rigorous', or 'probed' (fails with probability at most 1e-9 over "
        "seed).\n"
        "Non-finite entries give (-1, -1). Raises ValueError / TypeError that name the argument. See "
        "docs/certificates.md.");
  m.def("gram", &gram, "A"_a, py::kw_only(), "center"_a = false, "observations"_a = false,
        "float32"_a = false,
        "Gram matrix of A * 2**exponent in float64 with bounds of its error: A^T A, or A A^T with "
        "observations=True.");
  m.def("certified_count", &certified_count, "G"_a, py::kw_only(), "atol"_a = 0.0, "rtol"_a = 0.0,
        "gram_error"_a = 0.0, "without"_a = std::vector<std::string>{}, "start"_a = py::none(),
        "Interval of #{lambda(M) > max(atol^2, rtol^2 lambda_max)} for any M with ||M - G||_2 <= "
        "gram_error.\n\n"
        "without: error terms to leave out, which makes the result unproven; start: Lanczos start vector. "
        "For tests.");
  m.def("point_counts", &point_counts, "G"_a, "rtols"_a,
        "Numbers of eigenvalues of G above rtol^2 lambda_max by LDL^T, without a certificate: how sides past "
        "TRIDIAGONAL_SIDE are counted. The lower triangle of G is read.");
  m.def("inertia", &inertia, "G"_a, "shift"_a,
        "Positive pivots of LDL^T of G - shift I with the bounds of its error.");
  m.def(
      "lane_spectra", &lane_spectra, "G"_a, "x"_a = py::none(),
      "What point counts of small sides stand on: of 1 ... 8 positive semidefinite matrices (b, n, n), side "
      "by "
      "side,\nthe tridiagonal form times scale, the largest eigenvalue and the numbers of eigenvalues above "
      "x (b, t).");
  m.def(
      "sturm_count_above",
      [](const Array& d, const Array& e, double x) { return bsgap::sturm_count_above(tridiagonal(d, e), x); },
      "diagonal"_a, "off_diagonal"_a, "x"_a,
      "Number of eigenvalues of a symmetric tridiagonal matrix above x.");
  m.def(
      "tridiagonal_eigenvalue",
      [](const Array& d, const Array& e, int64_t rank) {
        if (rank < 1 || rank > d.size()) fail("rank must lie in 1 ... n, got " + std::to_string(rank));
        return bsgap::eigenvalue_by_bisection(tridiagonal(d, e), rank);
      },
      "diagonal"_a, "off_diagonal"_a, "rank"_a,
      "The rank-th largest eigenvalue (1 = the largest) by bisection.");
  m.def("probe_vectors", &probe_vectors, "n"_a, "seed"_a,
        "The Gaussian vectors of the probed certificate, one a row.");
  m.def("probe_bound", &probe_bound, "G"_a, "omega"_a, "y"_a, "product_error"_a = 0.0,
        "Bound of ||G - M||_2 from y = omega M, but for a probability of 1e-9.");
  m.def(
      "gram_roundings", &bsgap::gram_roundings, "depth"_a, "side"_a,
      "Roundings that a product goes through in a float64 Gram matrix of this side: its error is at most so "
      "many\nunits of roundoff of |X|^T |X|.");
  m.attr("FLOAT32_SUM_ROUNDINGS") = bsgap::kFloat32SumRoundings;
  m.attr("FLOAT32_LARGEST_TRACE") = bsgap::kFloat32LargestTrace;
  m.attr("FLOAT32_SMALLEST_SQUARE") = bsgap::kFlushedSmallestSquare;
  m.attr("PROBED_MIN_SIDE") = bsgap::kProbedMinSide;
  m.attr("PROBED_MIN_RTOL") = bsgap::kProbedMinRtol;
  m.attr("TRIDIAGONAL_SIDE") = bsgap::kLaneSide;
  m.def("fma_rate", &fma_rate, "dtype"_a, "seconds"_a,
        "Floating-point operations a second that the calling thread reaches in registers, for so many "
        "seconds; a multiply-add counts as two.");
  m.def("read_rate", &read_rate, "buffer"_a, "seconds"_a,
        "Bytes a second at which the calling thread reads a contiguous array, over and over.");
  m.def("instruction_set", &bsgap::instruction_set_name,
        "Vector instructions that the kernels use on this processor.");
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (int isa = static_cast<int>(bsgap::detail::best_instruction_set()); isa >= 0; --isa)
          names.push_back(bsgap::kIsaNames[isa]);
        return names;
      },
      "What the kernels could use on this processor, best first, whatever BSGAP_ISA says.");
}
