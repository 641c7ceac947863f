/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the qrexec agent starts for a call of qubes.ForwardTCP. If that is for one connection, this hands the
 * call's three descriptors over to the process that serves all such calls (target/singleservice.py), and ends
 * with the exit status that it is told. For a mux call, or where there is no such process, it becomes the
 * program that serves this call alone.
 *
 * It is written in C because starting Python takes longer than everything else that is done for a connection.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define PROGRAM "qubes-forward-service"
#define SOCKET_VARIABLE "QUBES_FORWARD_SERVICE_SOCKET"
#define SOCKET_PATH "/run/qubes-forward-service.socket"
/* As common/exitstatus.py has it. */
#define TROUBLE 125
/* How long it may take until the process has room for one more in its queue. */
#define PATIENCE_S 5

/* A socket that is connected to the process, or -1 if there is none. */
static int connected(void)
{
    const char *path = getenv(SOCKET_VARIABLE);
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    struct timeval patience = { .tv_sec = PATIENCE_S };

    if (path == NULL)
        path = SOCKET_PATH;
    if (strlen(path) >= sizeof(address.sun_path))
        return -1;
    strcpy(address.sun_path, path);
    int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (sock < 0)
        return -1;
    if (setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)) < 0 ||
        connect(sock, (const struct sockaddr *)&address, sizeof(address)) < 0) {
        close(sock);
        return -1;
    }
    return sock;
}

/* Send stdin, stdout and stderr, with the port, the calling qube and the agent's process. Returns 0 on success. */
static int hand_over(int sock, const char *port, const char *caller, const char *agent)
{
    const int fds[] = { 0, 1, 2 };
    union {
        char bytes[CMSG_SPACE(sizeof(fds))];
        struct cmsghdr header;
    } rights = { .bytes = { 0 } };
    char text[256];
    int length = snprintf(text, sizeof(text), "1 %s %s %s", port, caller, agent);

    if (length < 0 || (size_t)length >= sizeof(text))
        return -1;
    struct iovec part = { .iov_base = text, .iov_len = (size_t)length };
    struct msghdr message = {
        .msg_iov = &part,
        .msg_iovlen = 1,
        .msg_control = rights.bytes,
        .msg_controllen = sizeof(rights.bytes),
    };
    rights.header.cmsg_level = SOL_SOCKET;
    rights.header.cmsg_type = SCM_RIGHTS;
    rights.header.cmsg_len = CMSG_LEN(sizeof(fds));
    memcpy(CMSG_DATA(&rights.header), fds, sizeof(fds));
    return sendmsg(sock, &message, MSG_NOSIGNAL) == length ? 0 : -1;
}

/* The exit status that the process says; TROUBLE if it has ended without a word. */
static int status_from(int sock)
{
    unsigned char status;
    ssize_t count;

    do
        count = recv(sock, &status, 1, 0);
    while (count < 0 && errno == EINTR);
    return count == 1 ? status : TROUBLE;
}

/* Whether the argument asks for one connection, and not for a mux call. */
static int is_port(const char *argument)
{
    return *argument != '\0' && argument[strspn(argument, "0123456789")] == '\0';
}

/* Whether stdin, stdout and stderr are there: what is opened next gets the number of one that is not. */
static int are_open(void)
{
    return fcntl(0, F_GETFD) >= 0 && fcntl(1, F_GETFD) >= 0 && fcntl(2, F_GETFD) >= 0;
}

int main(int argc, char **argv)
{
    const char *caller = getenv("QREXEC_REMOTE_DOMAIN"), *agent = getenv("QREXEC_AGENT_PID");

    if (argc == 2 && is_port(argv[1]) && caller != NULL && agent != NULL && are_open()) {
        int sock = connected();
        if (sock >= 0) {
            if (hand_over(sock, argv[1], caller, agent) == 0) {
                /* They are the other process's now, whose closing of them has to be seen. */
                close(0);
                close(1);
                return status_from(sock);
            }
            close(sock);
        }
    }
    execvp(PROGRAM, argv);
    perror(PROGRAM);
    return TROUBLE;
}
