// Which GPUs there are is a question about a device, and devices are the workers' business: we ask the
// program strata-worker for its list and read its lines. One thread.
#include "cli/cli_devices.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/cli_process.h"

static int read_list(const char *text, uint32_t *devices, uint32_t *n, struct error *error)
{
    for (const char *at = text; *at;) {
        char *end;
        unsigned long index = strtoul(at, &end, 10);
        if (end == at || index > 63 || (*end && *end != ',') || *n == MAX_STAGES)
            return error_set(error, STATUS_INVALID,
                             "--devices '%s' is neither all nor none nor numbers as in 0,1", text);
        devices[(*n)++] = (uint32_t)index;
        at = *end ? end + 1 : end;
    }
    return *n ? STATUS_OK : error_set(error, STATUS_INVALID, "--devices names none");
}

// Lines "cuda INDEX ...". What the program says of GPUs that it cannot use is already on standard error.
static void read_lines(FILE *lines, uint32_t *devices, uint32_t *n)
{
    char line[512];
    unsigned index;
    while (fgets(line, sizeof(line), lines)) {
        if (sscanf(line, "cuda %u ", &index) == 1 && *n < MAX_STAGES)
            devices[(*n)++] = index;
    }
}

static int ask_worker(const char *programs, uint32_t *devices, uint32_t *n, struct error *error)
{
    char program[4200], option[] = "--list-devices";
    char *argv[] = {program, option, NULL};
    int ends[2];
    pid_t pid;
    snprintf(program, sizeof(program), "%s/strata-worker", programs);
    if (pipe2(ends, O_CLOEXEC))
        return error_set(error, STATUS_IO, "cannot make a pipe");
    int status = process_start(&pid, argv, ends[1], error);
    close(ends[1]);
    FILE *lines = status ? NULL : fdopen(ends[0], "r");
    if (!lines) {
        close(ends[0]);
    } else {
        read_lines(lines, devices, n);
        fclose(lines);
    }
    if (!status)
        waitpid(pid, NULL, 0);
    return status;
}

static int check_there(uint32_t device, const uint32_t *found, uint32_t n_found, struct error *error)
{
    for (uint32_t i = 0; i < n_found; i++) {
        if (found[i] == device)
            return STATUS_OK;
    }
    return error_set(
        error, STATUS_INVALID,
        "--devices names GPU %u, and %s here that Strata can use; see strata-worker --list-devices", device,
        n_found ? "it is none of those" : "there is none");
}

int cli_devices_read(const char *text, const char *programs, uint32_t devices[MAX_STAGES], uint32_t *n,
                     struct error *error)
{
    *n = 0;
    if (strcmp(text, "none") == 0)
        return STATUS_OK;
    if (strcmp(text, "all") == 0)
        return ask_worker(programs, devices, n, error);
    uint32_t found[MAX_STAGES], n_found = 0;
    int status = read_list(text, devices, n, error);
    if (!status)
        status = ask_worker(programs, found, &n_found, error);
    for (uint32_t i = 0; !status && i < *n; i++)
        status = check_there(devices[i], found, n_found, error);
    return status;
}
