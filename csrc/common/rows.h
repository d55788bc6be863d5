// What a row makes of the sums over its keys: value and lse, and the coefficients of its gradient.
//
// The derivation is that of cacr_kernels/reference.py, in the variables of the kernels. A kernel computes
// u_j = q.k_j - |k_j|^2/2, so that the cost is c_j = |q|^2 - 2 u_j, and measures it from the key with the largest
// weight, whose cost is top_cost:
//
//   d_j = u_j - u_top      e_j = exp(tau (c_j - top_cost)) = 2^(slope d_j),   slope = -2 log2(e) tau
//   w_j = factor e_j,      factor = 1 / sum_j e_j
//   delta = sum_j w_j d_j  F = top_cost - 2 delta,   lse = log(sum_j e_j) + tau top_cost
//
// These are a few numbers per row, and differences of them matter: they are float64 whatever the type of the products.
#pragma once

#include "kinds.h"

namespace cacr {

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

CACR_HOST_DEVICE double log_base_2(double x) {
#ifdef __CUDACC__
  return log2(x);
#else
  return __builtin_log2(x);  // the kernels for a processor use nothing of the namespace std
#endif
}

// ---- raw rows that count as unit vectors ----------------------------------------------------------------------------
constexpr double kShortest = 1e-12;  // rows at least this long become unit vectors (SHORTEST of reference.py)

// r = 1 / max(|x|, kShortest). Of rows of just that length it is a little less: r tells which ones are too short.
template <class T>
CACR_HOST_DEVICE T inverse_length(double length) {
  const T most = T(1 / kShortest), eps = sizeof(T) == 4 ? T(1.2e-7) : T(2.3e-16);
  if (length < kShortest) return most;
  const T r = T(1 / length);
  return r >= most ? most * (1 - eps) : r;
}

// Has a row that r no direction, and no gradient?
template <class T>
CACR_HOST_DEVICE bool is_short(T r) {
  return r == T(1 / kShortest);
}

// ---- the way forward ------------------------------------------------------------------------------------------------
struct RowResult {
  double value, lse;     // F and lse
  double delta, factor;  // see above
  double sum;            // sum_j e_j
  bool empty;
};

// Which of the two products of an lse stands first. Where a machine has fused multiply-add, the compiler fuses that one
// with the sum and rounds the other: every kernel keeps its own order, and with it its bits.
enum class LseOrder { kTopFirst, kSumFirst };

// lse of a set that is not empty. An infinite cost has no mass in the sum: the NaN of the value shows it.
template <LseOrder kOrder = LseOrder::kTopFirst>
CACR_HOST_DEVICE double row_lse(double value, double sum, double tau, double top_cost) {
  if (value != value) return value;
  if constexpr (kOrder == LseOrder::kTopFirst)
    return tau * top_cost + kLn2 * log_base_2(sum);
  else
    return kLn2 * log_base_2(sum) + tau * top_cost;
}

// sum: sum_j e_j; sum_d: sum_j e_j d_j. An empty set has value 0, lse -inf and no weights. 2^x of a NaN may come out as
// 0: numbers that are not finite show in `finite_tau` and in sum_d, and reach value, lse and weights from there.
template <LseOrder kOrder = LseOrder::kTopFirst>
CACR_HOST_DEVICE RowResult finish_row(double sum, double sum_d, double top_cost, double tau, bool finite_tau) {
  RowResult r{};
  r.empty = sum == 0 && sum_d == 0 && finite_tau;
  if (r.empty) {
    r.lse = -__builtin_inf();
    return r;
  }
  r.delta = sum_d / sum;
  r.value = sum == 0 || !finite_tau ? __builtin_nan("") : top_cost - 2 * r.delta;
  r.lse = row_lse<kOrder>(r.value, sum, tau, top_cost);
  r.factor = 1 / sum + 0 * r.value;
  r.sum = sum + 0 * r.value;
  return r;
}

// Entropy of the weights of a row.
CACR_HOST_DEVICE double row_entropy(double lse, double tau, double value) { return lse - tau * value; }

// cost="rbf": log F of a row from the two softmaxes, at -tau_neg and at -(tau_neg + s), and what it gains with tau_neg.
CACR_HOST_DEVICE double rbf_log_value(double lse, double sharper_lse) { return sharper_lse - lse; }
CACR_HOST_DEVICE double rbf_tau_derivative(double value, double sharper_value) { return value - sharper_value; }

// ---- the way back ---------------------------------------------------------------------------------------------------
// dL/dc_j = w_j (g_value (1 + tau (c_j - F)) + g_lse tau) with dc_j/du_j = -2 and c_j - F = -2 (d_j - delta), so that
//
//   dL/du_j = e_j (a + b (d_j - delta))
//   a = -2 factor (g_value + g_lse tau),   b = 4 factor g_value tau,   sum_j dL/du_j = a / factor
struct RowCoefficients {
  double a, b;
  double sum;  // sum_j dL/du_j
};

// What turns e_j into w_j = e_j factor / divisor: the CPU kernels keep the factor 1 / sum_j e_j, the CUDA kernels the
// sum itself as the divisor. The other one is 1 and changes nothing.
struct Normaliser {
  double factor, divisor;
  CACR_HOST_DEVICE Normaliser(double factor_, double divisor_ = 1) : factor(factor_), divisor(divisor_) {}
};

// g_value = dL/dF, g_lse = dL/dlse. detach_weights: the weights are constants, and the lse carries no gradient.
CACR_HOST_DEVICE RowCoefficients row_coefficients(Normaliser n, double g_value, double g_lse, double tau,
                                                  bool detach_weights) {
  const double t = detach_weights ? 0 : tau, sum = -2 * (g_value + (detach_weights ? 0 : g_lse * t));
  return {n.factor * sum / n.divisor, n.factor * 4 * g_value * t / n.divisor, sum};
}

// dL/dc of a key in a softmax where the costs are at hand: scale = dL/dF, centred = c - F. Value: as in key_gradient.
template <class Value, class Number>
CACR_HOST_DEVICE Value cost_gradient(const Number& scale, const Value& w, const Number& tau, const Value& centred) {
  return scale * w * (tau * centred + Number(1));
}

// Two softmaxes over one set, whose gradients nearly cancel (cost="rbf"): A w_0 + B w_1 = B (w_1 - w_0) + (A + B) w_0
// keeps what would be lost by rounding A and B. So the a of the first softmax is that of their sum, and the a of the
// second one multiplies e_1 - ratio e_0. For rows that have weights in the second softmax.
struct CancellingCoefficients {
  double first_a, ratio;
};

CACR_HOST_DEVICE CancellingCoefficients cancelling_coefficients(Normaliser first, Normaliser second, double sum) {
  return {first.factor * sum / first.divisor, first.factor * second.divisor / (second.factor * first.divisor)};
}

// dL/du of a key in one softmax; d: d_j - delta. Value: float, double, or vectors of them; a and b may be numbers
// there.
template <class Value, class Coefficient>
CACR_HOST_DEVICE Value key_gradient(const Value& e, const Value& d, const Coefficient& a, const Coefficient& b) {
  return e * (a + b * d);
}

// The same for one of two softmaxes; less: ratio e_0 in the second one, 0 in the first.
template <class Value, class Coefficient>
CACR_HOST_DEVICE Value key_gradient(const Value& e, const Value& less, const Value& d, const Coefficient& a,
                                    const Coefficient& b) {
  const Value constant_part = a * (e - less);  // first: the order decides which product is fused with the sum
  return constant_part + b * (e * d);
}

}  // namespace cacr
