/* The guest's end in tests of vsock: busybox has none.
 *   vsock connect PORT   connects to the host, sends stdin, prints the answer
 *   vsock echo PORT      says "listening", serves one client after another */
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char buffer[65536];

static void copy(int from, int to)
{
	ssize_t n, done, w;

	while ((n = read(from, buffer, sizeof(buffer))) > 0)
		for (done = 0; done < n; done += w)
			if ((w = write(to, buffer + done, n - done)) < 0)
				return;
}

int main(int argc, char **argv)
{
	struct sockaddr_vm addr = { .svm_family = AF_VSOCK };
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0), client;

	if (argc != 3 || fd < 0)
		return 2;
	addr.svm_port = atoi(argv[2]);
	if (!strcmp(argv[1], "connect")) {
		addr.svm_cid = VMADDR_CID_HOST;
		if (connect(fd, (struct sockaddr *)&addr, sizeof(addr))) {
			perror("connect");
			return 1;
		}
		copy(0, fd);
		shutdown(fd, SHUT_WR);
		copy(fd, 1);
		return 0;
	}
	addr.svm_cid = VMADDR_CID_ANY;
	if (bind(fd, (struct sockaddr *)&addr, sizeof(addr)) || listen(fd, 8))
		return 1;
	puts("listening");
	fflush(stdout);
	while ((client = accept(fd, NULL, NULL)) >= 0) {
		copy(client, client);
		close(client);
	}
	return 1;
}
