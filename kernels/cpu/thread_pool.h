// Threads that wait between calls.
#pragma once

#include <cstdint>
#include <functional>

namespace spt_fast {

// Calls work(thread, task) once for every task of 0 .. tasks - 1, on up to `threads` threads of which the caller is
// one; `thread` counts from 0 and no two calls run at the same time with the same number. Tasks start in order. Calls
// from several threads take turns. `work` must not throw.
void run_in_parallel(int threads, int64_t tasks, const std::function<void(int, int64_t)>& work);

}  // namespace spt_fast
