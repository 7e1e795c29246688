// Lanes<T> for instruction sets without masked moves: a part of a row goes through a buffer of a whole step, unless it is
// one. Included inside an anonymous namespace, after a Format for each T that moves whole steps.

template <class T, class Format>
struct PartsByBuffer : Format {
  using Acc = typename Format::Acc;
  using Reg = typename Format::Reg;
  static constexpr int kStep = 2 * Format::kWidth;
  static void load_part(const T* p, int64_t n, Reg& low, Reg& high) {
    if (n == kStep) return Format::load(p, low, high);
    T buffer[kStep] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    Format::load(buffer, low, high);
  }
  static void store_part(T* p, int64_t n, Reg low, Reg high) {
    if (n == kStep) return Format::store(p, low, high);
    T buffer[kStep];
    Format::store(buffer, low, high);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
  }
  static void load_basis_part(const Acc* p, int64_t n, Reg& low, Reg& high) {
    if (n == kStep) return Format::load_basis(p, low, high);
    Acc buffer[kStep] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    Format::load_basis(buffer, low, high);
  }
};

template <class T>
struct Lanes;
template <>
struct Lanes<float> : PartsByBuffer<float, FloatFormat> {};
template <>
struct Lanes<double> : PartsByBuffer<double, DoubleFormat> {};
template <>
struct Lanes<BFloat16> : PartsByBuffer<BFloat16, BFloat16Format> {};
template <>
struct Lanes<Half> : PartsByBuffer<Half, HalfFormat> {};
