/*
 * Makes every system call there is, and some there are not, each with
 * arguments that do no harm, and says what its kernel answered, a line each:
 *
 *   nr NUMBER OUTCOME     ok, an errno's number, "signal N" or "exit N"
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define NUMBERS 512
/* Of a call that waits. */
#define PATIENCE_SECONDS 1

/* No function: some return twice, or on a stack that is gone. */
static inline __attribute__((always_inline)) long call(long number)
{
	long result;
	register long r10 __asm__("r10") = -1, r8 __asm__("r8") = -1, r9 __asm__("r9") = -1;

	__asm__ volatile("syscall" : "=a"(result)
			 : "a"(number), "D"(-1L), "S"(-1L), "d"(-1L), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

int main(void)
{
	volatile long *answer = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
				     MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (answer == MAP_FAILED)
		return 1;
	for (long number = 0; number < NUMBERS; number++) {
		int status;
		pid_t child = fork();

		if (child < 0)
			return 1;
		if (child == 0) {
			/* Out of reach of what a call does to its group. */
			setsid();
			alarm(PATIENCE_SECONDS);
			*answer = call(number);
			_exit(0);
		}
		if (waitpid(child, &status, 0) != child)
			return 1;
		if (WIFSIGNALED(status))
			printf("nr %ld signal %d\n", number, WTERMSIG(status));
		else if (WEXITSTATUS(status) != 0)
			printf("nr %ld exit %d\n", number, WEXITSTATUS(status));
		else if (*answer < 0 && *answer > -4096)
			printf("nr %ld %ld\n", number, -*answer);
		else
			printf("nr %ld ok\n", number);
		fflush(stdout);
	}
	printf("numbers %d\n", NUMBERS);
	return 0;
}
