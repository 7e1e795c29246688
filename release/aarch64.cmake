# For CMAKE_TOOLCHAIN_FILE: what `make wheels` on another machine compiles the aarch64 wheel with, beside CXX.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
