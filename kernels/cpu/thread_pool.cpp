#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace spt_fast {
namespace {

using Work = std::function<void(int, int64_t)>;

class Pool {
public:
    void run(int threads, int64_t tasks, const Work& work) {
        const std::lock_guard<std::mutex> turn(turn_);
        start_helpers(threads - 1);
        {
            const std::lock_guard<std::mutex> lock(state_);
            work_ = &work;
            tasks_ = tasks;
            next_ = 0;
            wanted_ = busy_ = std::min(threads - 1, started_);
            ++round_;
        }
        wake_.notify_all();
        take_tasks(0, work, tasks);
        std::unique_lock<std::mutex> lock(state_);
        done_.wait(lock, [this] { return busy_ == 0; });
    }

private:
    void start_helpers(int count) {
        for (; started_ < count; ++started_) {
            try {
                std::thread(&Pool::help, this, started_ + 1, round_).detach();
            } catch (const std::system_error&) {
                return;  // the system gives no more threads; the work is done by those there are
            }
        }
    }

    void take_tasks(int thread, const Work& work, int64_t tasks) {
        for (int64_t task = next_++; task < tasks; task = next_++) work(thread, task);
    }

    void help(int thread, uint64_t round) {
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            wake_.wait(lock, [&] { return round_ != round; });
            round = round_;
            if (thread > wanted_) continue;
            const Work& work = *work_;
            const int64_t tasks = tasks_;
            lock.unlock();
            take_tasks(thread, work, tasks);
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_;  // held by the caller whose work is being done
    std::mutex state_;
    std::condition_variable wake_;
    std::condition_variable done_;
    int started_ = 0;
    uint64_t round_ = 0;
    const Work* work_ = nullptr;
    int64_t tasks_ = 0;
    int wanted_ = 0;
    int busy_ = 0;
    std::atomic<int64_t> next_{0};
};

// Never destroyed: its threads may be waiting when the process exits. A child of fork() has none of them, and perhaps
// locked mutexes, so it begins with a new pool.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
    static const int at_fork = pthread_atfork(nullptr, nullptr, [] { the_pool = nullptr; });
    (void)at_fork;
    Pool* existing = the_pool;
    if (existing == nullptr) {
        Pool* fresh = new Pool;
        if (the_pool.compare_exchange_strong(existing, fresh)) return *fresh;
        delete fresh;
    }
    return *existing;
}

}  // namespace

void run_in_parallel(int threads, int64_t tasks, const Work& work) {
    if (tasks < threads) threads = static_cast<int>(tasks);
    if (threads <= 1) {
        for (int64_t task = 0; task < tasks; ++task) work(0, task);
        return;
    }
    pool().run(threads, tasks, work);
}

}  // namespace spt_fast
