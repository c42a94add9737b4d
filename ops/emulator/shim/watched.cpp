// The kernels once more, instrumented: every load and store tells `watch.cpp`. In a namespace of their own, since the
// linker would take either copy of an inline function for both.
#define lf lf_watched
#define LF_WATCHED 1
#define lf_link_test_kernels lf_link_watched_kernels
#include "linfusion.cu"
#include "../tests/kernels.cpp"
