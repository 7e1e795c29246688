// Four things that newer gcc and glibc headers make a caller take from the machine it runs on, and that machines of
// manylinux_2_28 (glibc 2.28, the libstdc++ of gcc 8) do not have. Defined here, they stay inside the library.
#include <new>
#include <sstream>

#if defined(__GLIBCXX__) && defined(__linux__)

// Default constructors that libstdc++ exports since gcc 9 (GLIBCXX_3.4.26).
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

// What containers call since gcc 11 for more elements than memory has addresses (GLIBCXX_3.4.29).
namespace std {
[[noreturn]] void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}  // namespace std

// Since glibc 2.32 std::shared_ptr counts without atomics where this is true. Torch always has several threads.
extern "C" {
extern __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
}

#endif
