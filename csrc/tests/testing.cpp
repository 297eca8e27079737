#include "tests/testing.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace fastlora::testing {
namespace {

constexpr int kMostFailures = 40;  // printed before the program gives up

char g_case[512];
std::mutex g_mutex;
std::atomic<int64_t> g_checks{0}, g_failures{0};

// Only write() is safe in a handler.
void say(const char* text) {
  if (write(STDERR_FILENO, text, strlen(text)) < 0) _exit(3);
}

void report_fault(int signal_number) {
  say(signal_number == SIGILL ? "FAIL illegal instruction in: " : "FAIL access outside a buffer in: ");
  say(g_case);
  say("\n");
  signal(signal_number, SIG_DFL);  // the faulting instruction runs again and ends the program
}

}  // namespace

void set_case(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(g_case, sizeof g_case, format, arguments);
  va_end(arguments);
}

bool check(bool holds, const char* format, ...) {
  g_checks.fetch_add(1, std::memory_order_relaxed);
  if (holds) return true;
  const std::lock_guard<std::mutex> lock(g_mutex);
  fprintf(stderr, "FAIL %s: ", g_case);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  if (g_failures.fetch_add(1) + 1 >= kMostFailures) {
    fprintf(stderr, "giving up after %d failures\n", kMostFailures);
    _exit(1);
  }
  return false;
}

void install_fault_report() {
  for (const int number : {SIGSEGV, SIGBUS, SIGILL}) signal(number, report_fault);
}

int finish() {
  const long long checks = g_checks.load(), failures = g_failures.load();
  fprintf(stderr, "%lld checks, %lld failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}

int run_groups(int argc, char** argv, const Group* groups, int count) {
  const auto find = [&](const char* name) {
    for (int i = 0; i < count; ++i) {
      if (strcmp(groups[i].name, name) == 0) return groups + i;
    }
    fprintf(stderr, "expected groups of checks among");
    for (int i = 0; i < count; ++i) fprintf(stderr, " %s", groups[i].name);
    fprintf(stderr, ", got %s\n", name);
    exit(2);
  };
  for (int i = 1; i < argc; ++i) find(argv[i]);
  for (int i = 1; i < argc; ++i) find(argv[i])->run();
  for (int i = 0; i < count && argc < 2; ++i) groups[i].run();
  for (int i = 1; i < argc; ++i) fprintf(stderr, "%s ", argv[i]);
  return finish();
}

}  // namespace fastlora::testing
