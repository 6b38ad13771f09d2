// fork and exec with what supervision needs: a child that dies with its parent, clean signals, no stray
// descriptors.
#include "cli/cli_process.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

int process_own_directory(char *out, size_t capacity, struct error *error)
{
    ssize_t length = readlink("/proc/self/exe", out, capacity - 1);
    if (length < 0)
        return error_set(error, STATUS_IO, "/proc/self/exe: %s", strerror(errno));
    out[length] = '\0';
    char *slash = strrchr(out, '/');
    if (slash)
        *slash = '\0';
    return STATUS_OK;
}

// In the child, between fork and exec: async-signal-safe calls only.
static void become(char *const *argv, int stdout_fd, pid_t parent)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGINT, SIG_IGN); // a Ctrl-C on the terminal is the supervisor's to pass on, in order
    signal(SIGPIPE, SIG_DFL);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent)
        _exit(127);
    if (stdout_fd >= 0)
        dup2(stdout_fd, STDOUT_FILENO);
    execv(argv[0], argv);
    _exit(127);
}

int process_start(pid_t *out, char *const *argv, int stdout_fd, struct error *error)
{
    if (access(argv[0], X_OK))
        return error_set(error, STATUS_NOT_FOUND, "%s: %s", argv[0], strerror(errno));
    pid_t parent = getpid();
    pid_t child = fork();
    if (child < 0)
        return error_set(error, STATUS_IO, "cannot start %s: %s", argv[0], strerror(errno));
    if (child == 0)
        become(argv, stdout_fd, parent);
    *out = child;
    return STATUS_OK;
}

void process_describe_end(int wait_status, char *out, size_t capacity)
{
    if (WIFEXITED(wait_status))
        snprintf(out, capacity, "exited with code %d", WEXITSTATUS(wait_status));
    else
        snprintf(out, capacity, "was killed by SIG%s (%s)", sigabbrev_np(WTERMSIG(wait_status)),
                 strsignal(WTERMSIG(wait_status)));
}
