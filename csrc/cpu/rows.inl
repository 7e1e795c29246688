// The row kernel, included once by the translation unit of each instruction set, inside an anonymous namespace:
// internal linkage, so that the linker cannot hand a version built with AVX-512 to everybody.
//
// The includer defines, for T in float, BFloat16, Half, double:
//     Lanes<T>::Acc, Reg (a register of Acc), kWidth (its lanes), and moves of 2 * kWidth elements
//         load(const T*, Reg& low, Reg& high)    load_part(const T*, int64_t n, ...): n of them, the rest zero
//         store(T*, Reg low, Reg high)           store_part(T*, int64_t n, ...): n of them
//         load_basis(const Acc*, ...), load_basis_part(...): Acc numbers in the lane order that load gives T
// and for Reg: fill(Acc) -> Reg, multiply, add, multiply_add(a, b, c) = a b + c, sum(Reg) -> Acc;
// and kAccumulators, how many registers of sums fit beside the operands.

// Registers of sums for one row and column of U: two hide the latency of the multiply-add where columns are few.
template <int R>
constexpr int kSums = R < 4 ? 2 : 1;

// Rows handled together, so that a register of the basis is loaded once for all of them.
template <int R>
constexpr int kRowsTogether = kAccumulators / (kSums<R> * R) > 0 ? kAccumulators / (kSums<R> * R) : 1;

// Loops over rows and ranks are over registers: unrolled whole, or the arrays would live in memory.
#define TINYLORA_UNROLL _Pragma("GCC unroll 16")

// s = x U for one row over its finite elements alone. For rows whose sum was not finite, which are few: element by element.
template <class T>
__attribute__((noinline, cold)) void project_finite(const T* x, const typename Lanes<T>::Acc* basis,
                                                    int64_t basis_stride, int64_t features, int64_t rank,
                                                    typename Lanes<T>::Acc* s) {
  using L = Lanes<T>;
  using Reg = typename L::Reg;
  using Acc = typename L::Acc;
  constexpr int kStep = 2 * L::kWidth;
  for (int64_t k = 0; k < rank; ++k) s[k] = 0;
  for (int64_t d = 0; d < features; d += kStep) {
    const int64_t part = features - d < kStep ? features - d : kStep;
    Reg x_part[2], u_part[2];
    Acc value[kStep], u[kStep];
    L::load_part(x + d, part, x_part[0], x_part[1]);
    __builtin_memcpy(value, x_part, sizeof value);
    for (int64_t k = 0; k < rank; ++k) {
      L::load_basis_part(basis + k * basis_stride + d, part, u_part[0], u_part[1]);  // in the lane order of x
      __builtin_memcpy(u, u_part, sizeof u);
      for (int i = 0; i < kStep; ++i) {
        if (value[i] - value[i] == 0) s[k] += value[i] * u[i];
      }
    }
  }
}

template <class Acc>
inline bool all_finite(const Acc* s, int64_t rank) {
  Acc zero = 0;
  for (int64_t k = 0; k < rank; ++k) zero += s[k] - s[k];
  return zero == 0;
}

// s = x U for NR rows.
template <class T, int R, int NR>
inline void project(const T* x, int64_t stride, const typename Lanes<T>::Acc* basis, int64_t basis_stride,
                    int64_t width, typename Lanes<T>::Acc (&s)[NR][R]) {
  using L = Lanes<T>;
  using Reg = typename L::Reg;
  Reg sums[NR][R][kSums<R>];
  TINYLORA_UNROLL
  for (int n = 0; n < NR; ++n) {
    TINYLORA_UNROLL
    for (int k = 0; k < R; ++k) {
      for (Reg& sum : sums[n][k]) sum = L::fill(0);
    }
  }
  const auto step = [&](const auto& load_rows, const auto& load_basis) {
    Reg x_low[NR], x_high[NR], u_low, u_high;
    TINYLORA_UNROLL
    for (int n = 0; n < NR; ++n) load_rows(n, x_low[n], x_high[n]);
    TINYLORA_UNROLL
    for (int k = 0; k < R; ++k) {
      load_basis(k, u_low, u_high);
      TINYLORA_UNROLL
      for (int n = 0; n < NR; ++n) {
        Reg &low = sums[n][k][0], &high = sums[n][k][kSums<R> - 1];
        low = L::multiply_add(x_low[n], u_low, low);
        high = L::multiply_add(x_high[n], u_high, high);
      }
    }
  };
  int64_t d = 0;
  for (; d + 2 * L::kWidth <= width; d += 2 * L::kWidth) {
    step([&](int n, Reg& a, Reg& b) { L::load(x + n * stride + d, a, b); },
         [&](int k, Reg& a, Reg& b) { L::load_basis(basis + k * basis_stride + d, a, b); });
  }
  if (d < width) {
    step([&](int n, Reg& a, Reg& b) { L::load_part(x + n * stride + d, width - d, a, b); },
         [&](int k, Reg& a, Reg& b) { L::load_basis_part(basis + k * basis_stride + d, width - d, a, b); });
  }
  TINYLORA_UNROLL
  for (int n = 0; n < NR; ++n) {
    TINYLORA_UNROLL
    for (int k = 0; k < R; ++k) {
      s[n][k] = L::sum(kSums<R> == 1 ? sums[n][k][0] : L::add(sums[n][k][0], sums[n][k][kSums<R> - 1]));
    }
  }
}

// Calls for elements that will be read and written soon. Right after the matrix product they lie in the outer caches, or
// in those of the other core, while the arithmetic here leaves the memory idle: 512 x 576 in bfloat16 on 2 threads of a
// Sapphire Rapids, 44 us without and 30 with. An address beyond the tensor is a wish that nobody grants.
template <int Elements, class T>
inline void fetch_for_writing(const T* x) {
  constexpr int kLine = 64;  // bytes
  TINYLORA_UNROLL
  for (int at = 0; at < int(Elements * sizeof(T)); at += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(x) + at, /*for writing*/ 1);
  }
}

// What a row starts from before the gains are added.
enum class Start { kZero, kAddend, kAddendAndBias };

// y = x + bias + z F for NR rows, F [R, width]; y may be x. What kStart leaves out is not looked at.
template <class T, int R, int NR, Start kStart>
inline void accumulate(const T* x, int64_t x_stride, const T* bias, T* y, int64_t y_stride,
                       const typename Lanes<T>::Acc* factor, int64_t factor_stride, int64_t width,
                       const typename Lanes<T>::Acc (&z)[NR][R]) {
  using L = Lanes<T>;
  using Reg = typename L::Reg;
  // Where rows have the precision of the sums, the small terms are added up first: x is rounded once. 16-bit rows are
  // rounded on the way out, so there the terms go straight onto x, one instruction less.
  constexpr bool kTermsFirst = sizeof(T) == sizeof(typename L::Acc);
  constexpr bool kAdd = kStart != Start::kZero, kBias = kStart == Start::kAddendAndBias;
  Reg weight[NR][R];
  TINYLORA_UNROLL
  for (int n = 0; n < NR; ++n) {
    TINYLORA_UNROLL
    for (int k = 0; k < R; ++k) weight[n][k] = L::fill(z[n][k]);
  }
  const auto step = [&](const auto& load_rows, const auto& load_bias, const auto& load_factor, const auto& store_rows) {
    Reg low[NR], high[NR], f_low, f_high, x_low, x_high, b_low, b_high;
    TINYLORA_UNROLL
    for (int n = 0; n < NR && kAdd && !kTermsFirst; ++n) load_rows(n, low[n], high[n]);
    TINYLORA_UNROLL
    for (int k = 0; k < R; ++k) {
      load_factor(k, f_low, f_high);
      TINYLORA_UNROLL
      for (int n = 0; n < NR; ++n) {
        const bool first = (kTermsFirst || !kAdd) && k == 0;
        low[n] = first ? L::multiply(weight[n][k], f_low) : L::multiply_add(weight[n][k], f_low, low[n]);
        high[n] = first ? L::multiply(weight[n][k], f_high) : L::multiply_add(weight[n][k], f_high, high[n]);
      }
    }
    if constexpr (kBias) load_bias(b_low, b_high);
    TINYLORA_UNROLL
    for (int n = 0; n < NR; ++n) {
      if constexpr (kTermsFirst && kAdd) {
        load_rows(n, x_low, x_high);
        low[n] = L::add(x_low, low[n]);
        high[n] = L::add(x_high, high[n]);
      }
      if constexpr (kBias) {
        low[n] = L::add(low[n], b_low);
        high[n] = L::add(high[n], b_high);
      }
      store_rows(n, low[n], high[n]);
    }
  };
  int64_t d = 0;
  for (; d + 2 * L::kWidth <= width; d += 2 * L::kWidth) {
    TINYLORA_UNROLL
    for (int n = NR; n < 2 * NR; ++n) fetch_for_writing<2 * L::kWidth>(y + n * y_stride + d);
    step([&](int n, Reg& a, Reg& b) { L::load(x + n * x_stride + d, a, b); },
         [&](Reg& a, Reg& b) { L::load(bias + d, a, b); },
         [&](int k, Reg& a, Reg& b) { L::load_basis(factor + k * factor_stride + d, a, b); },
         [&](int n, Reg a, Reg b) { L::store(y + n * y_stride + d, a, b); });
  }
  if (const int64_t part = width - d; part > 0) {
    step([&](int n, Reg& a, Reg& b) { L::load_part(x + n * x_stride + d, part, a, b); },
         [&](Reg& a, Reg& b) { L::load_part(bias + d, part, a, b); },
         [&](int k, Reg& a, Reg& b) { L::load_basis_part(factor + k * factor_stride + d, part, a, b); },
         [&](int n, Reg a, Reg b) { L::store_part(y + n * y_stride + d, part, a, b); });
  }
}

// K of the row's adapter, or null for a row to leave alone.
template <class Acc>
inline const Acc* mixing_of(const RowsJob& job, int64_t n) {
  const Acc* mixing = static_cast<const Acc*>(job.mixing);
  if (!job.slot_of_id) return mixing;
  const int64_t slot = job.slot_of_id[n / job.rows_per_id];
  return slot < 0 ? nullptr : mixing + slot * job.rank * job.rank;
}

template <class T, int R, int NR>
inline void accumulate_rows(const T* from, int64_t stride, const T* bias, T* y, int64_t y_stride,
                            const typename Lanes<T>::Acc* factor, int64_t factor_stride, int64_t width,
                            const typename Lanes<T>::Acc (&z)[NR][R]) {
  if (!from) {
    accumulate<T, R, NR, Start::kZero>(y, y_stride, bias, y, y_stride, factor, factor_stride, width, z);
  } else if (!bias) {
    accumulate<T, R, NR, Start::kAddend>(from, stride, bias, y, y_stride, factor, factor_stride, width, z);
  } else {
    accumulate<T, R, NR, Start::kAddendAndBias>(from, stride, bias, y, y_stride, factor, factor_stride, width, z);
  }
}

// A row without an adapter: to = from + bias. from may be null, for zeros.
template <class T>
inline void copy_row(const T* from, const T* bias, T* to, const typename Lanes<T>::Acc* factor, int64_t width) {
  using Acc = typename Lanes<T>::Acc;
  if (bias) {  // rounded as a row with an adapter is
    const Acc none[1][1] = {};
    accumulate<T, 1, 1, Start::kAddendAndBias>(from, 0, bias, to, 0, factor, width, width, none);
  } else if (!from) {
    __builtin_memset(to, 0, width * sizeof(T));
  } else if (from != to) {
    __builtin_memcpy(to, from, width * sizeof(T));
  }
}

// Rows [first, first + NR).
template <class T, int R, int NR>
inline void row_block(const RowsJob& job, int64_t first) {
  using Acc = typename Lanes<T>::Acc;
  const Acc* basis = static_cast<const Acc*>(job.basis);    // [R, D]
  const Acc* offset = static_cast<const Acc*>(job.offset);  // [R]
  const T* x = static_cast<const T*>(job.src) + first * job.src_stride;
  Acc s[NR][R], z[NR][R];
  // s = x U - c
  project<T, R, NR>(x, job.src_stride, basis, job.basis_stride, job.features, s);
  Acc* coefficients = static_cast<Acc*>(job.coefficients) + first * R;
  for (int n = 0; n < NR; ++n) {
    if (job.finite_only && !all_finite(s[n], R)) {
      project_finite(x + n * job.src_stride, basis, job.basis_stride, job.features, R, s[n]);
    }
    for (int k = 0; k < R; ++k) {
      if (offset) s[n][k] -= offset[k];
      coefficients[n * R + k] = s[n][k];
    }
  }
  if (!job.dst) return;
  const T* b = job.addend ? static_cast<const T*>(job.addend) + first * job.addend_stride : nullptr;
  const T* bias = static_cast<const T*>(job.bias);
  T* y = static_cast<T*>(job.dst) + first * job.dst_stride;
  const Acc* factor = static_cast<const Acc*>(job.factor);  // [R, E]
  // z = s K^T
  bool every_row = true;
  for (int n = 0; n < NR; ++n) {
    const Acc* mixing = mixing_of<Acc>(job, first + n);
    every_row = every_row && mixing;
    for (int j = 0; j < R; ++j) {
      Acc sum = 0;
      for (int k = 0; mixing && k < R; ++k) sum += mixing[j * R + k] * s[n][k];
      z[n][j] = sum;
    }
  }
  // y = b + bias + z F
  if (every_row) {
    accumulate_rows<T, R, NR>(b, job.addend_stride, bias, y, job.dst_stride, factor, job.factor_stride, job.dst_features,
                              z);
    return;
  }
  for (int n = 0; n < NR; ++n) {
    const T* from = b ? b + n * job.addend_stride : nullptr;
    T* to = y + n * job.dst_stride;
    if (mixing_of<Acc>(job, first + n)) {
      const auto& z_n = reinterpret_cast<const Acc(&)[1][R]>(z[n]);
      accumulate_rows<T, R, 1>(from, 0, bias, to, 0, factor, job.factor_stride, job.dst_features, z_n);
    } else {
      copy_row(from, bias, to, factor, job.dst_features);
    }
  }
}

template <class T, int R>
inline void rows_of_rank(const RowsJob& job, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + kRowsTogether<R> <= end; n += kRowsTogether<R>) row_block<T, R, kRowsTogether<R>>(job, n);
  for (; n < end; ++n) row_block<T, R, 1>(job, n);
}

// Any rank, one row at a time: columns of U by fours, then one by one.
template <class T>
inline void rows_of_any_rank(const RowsJob& job, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using Acc = typename L::Acc;
  using Reg = typename L::Reg;
  const int64_t r = job.rank, width = job.features, dst_width = job.dst_features, stride = job.basis_stride;
  const Acc* basis = static_cast<const Acc*>(job.basis);
  const Acc* factor = static_cast<const Acc*>(job.factor);
  const Acc* offset = static_cast<const Acc*>(job.offset);
  const T* bias = static_cast<const T*>(job.bias);
  for (int64_t n = begin; n < end; ++n) {
    const T* x = static_cast<const T*>(job.src) + n * job.src_stride;
    Acc* s = static_cast<Acc*>(job.coefficients) + n * r;  // [r]
    int64_t k = 0;
    for (; k + 4 <= r; k += 4) {
      project<T, 4, 1>(x, 0, basis + k * stride, stride, width, reinterpret_cast<Acc(&)[1][4]>(s[k]));
    }
    for (; k < r; ++k) project<T, 1, 1>(x, 0, basis + k * stride, stride, width, reinterpret_cast<Acc(&)[1][1]>(s[k]));
    if (job.finite_only && !all_finite(s, r)) project_finite(x, basis, stride, width, r, s);
    for (k = 0; offset && k < r; ++k) s[k] -= offset[k];
    if (!job.dst) continue;
    const T* b = job.addend ? static_cast<const T*>(job.addend) + n * job.addend_stride : nullptr;
    T* y = static_cast<T*>(job.dst) + n * job.dst_stride;
    const Acc* mixing = mixing_of<Acc>(job, n);
    if (!mixing) {
      copy_row(b, bias, y, factor, dst_width);
      continue;
    }
    Acc* z = static_cast<Acc*>(job.gains) + n * r;  // [r]
    for (int64_t j = 0; j < r; ++j) {
      z[j] = 0;
      for (k = 0; k < r; ++k) z[j] += mixing[j * r + k] * s[k];
    }
    for (int64_t d = 0; d < dst_width; d += 2 * L::kWidth) {
      const int64_t part = dst_width - d < 2 * L::kWidth ? dst_width - d : 2 * L::kWidth;
      Reg delta_low = L::fill(0), delta_high = L::fill(0), f_low, f_high, b_low, b_high;
      for (int64_t j = 0; j < r; ++j) {
        L::load_basis_part(factor + j * job.factor_stride + d, part, f_low, f_high);
        delta_low = L::multiply_add(L::fill(z[j]), f_low, delta_low);
        delta_high = L::multiply_add(L::fill(z[j]), f_high, delta_high);
      }
      if (b) {
        L::load_part(b + d, part, b_low, b_high);
        delta_low = L::add(b_low, delta_low);
        delta_high = L::add(b_high, delta_high);
      }
      if (bias) {
        L::load_part(bias + d, part, b_low, b_high);
        delta_low = L::add(delta_low, b_low);
        delta_high = L::add(delta_high, b_high);
      }
      L::store_part(y + d, part, delta_low, delta_high);
    }
  }
}

template <class T>
void rows(const RowsJob& job, int64_t begin, int64_t end) {
  switch (job.rank) {
    case 1: return rows_of_rank<T, 1>(job, begin, end);
    case 2: return rows_of_rank<T, 2>(job, begin, end);
    case 4: return rows_of_rank<T, 4>(job, begin, end);
    case 8: return rows_of_rank<T, 8>(job, begin, end);
    default: return rows_of_any_rank<T>(job, begin, end);
  }
}
