// Lanes<T> from a Format that moves one register at a time, for instruction sets without masked moves: a part of a
// row goes through a buffer. Included inside an anonymous namespace.

template <class T>
struct Lanes;

template <class T, class Format>
struct LanesByOne : Format {
  using Acc = typename Format::Acc;
  using Reg = typename Format::Reg;
  static constexpr int kStep = 2 * Format::kWidth;
  static void load(const T* p, Reg& low, Reg& high) {
    low = Format::load_one(p);
    high = Format::load_one(p + Format::kWidth);
  }
  static void store(T* p, Reg low, Reg high) {
    Format::store_one(p, low);
    Format::store_one(p + Format::kWidth, high);
  }
  static void load_part(const T* p, int64_t n, Reg& low, Reg& high) {
    T buffer[kStep] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    load(buffer, low, high);
  }
  static void store_part(T* p, int64_t n, Reg low, Reg high) {
    T buffer[kStep];
    store(buffer, low, high);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
  }
  static void load_basis(const Acc* p, Reg& low, Reg& high) { Lanes<Acc>::load(p, low, high); }
  static void load_basis_part(const Acc* p, int64_t n, Reg& low, Reg& high) { Lanes<Acc>::load_part(p, n, low, high); }
};

template <>
struct Lanes<float> : LanesByOne<float, FloatFormat> {};
template <>
struct Lanes<double> : LanesByOne<double, DoubleFormat> {};
template <>
struct Lanes<BFloat16> : LanesByOne<BFloat16, BFloat16Format> {};
template <>
struct Lanes<Half> : LanesByOne<Half, HalfFormat> {};
