// Command berth is a container runtime for Kubernetes: `berth serve` answers the kubelet, `berth proxy` is there in
// place of kube-proxy, and the rest is for operators.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/berth-run/berth/internal/version"
)

// Exit codes.
const (
	exitFailure = 1
	exitUsage   = 2 // what was asked for makes no sense; nothing was done
	exitDiffers = 3 // explain: the kernel has something else than it should have
	exitNobody  = 4 // explain: no Service has what was asked for
	exitWaiting = 5 // explain: the API server has not told of Services yet
)

func main() {
	cmd, err := command().ExecuteContextC(context.Background())
	if err == nil {
		return
	}
	code := exitCode(err)
	switch {
	case errors.Is(err, errTold):
	case code == exitUsage:
		fmt.Fprintf(os.Stderr, "berth: %v (see %s --help)\n", err, cmd.CommandPath())
	default:
		fmt.Fprintln(os.Stderr, "berth:", err)
	}
	os.Exit(code)
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "berth",
		Short: "A container runtime for Kubernetes",
		Long: "A container runtime for Kubernetes: serve is the daemon, which a kubelet uses; proxy is there in place\n" +
			"of kube-proxy; the rest asks a daemon that runs.",
		Version:       version.String(),
		SilenceUsage:  true,
		SilenceErrors: true, // main says them, once
	}
	root.SetVersionTemplate("berth {{.Version}}\n")
	root.AddCommand(serveCommand(), proxyCommand(), explainCommand(), imagesCommand(), registryCommand(), versionCommand())
	markFailures(root)
	return root
}

// failure is the error of a command that was understood.
type failure struct{ error }

// Unwrap is for errors.Is and errors.As.
func (f *failure) Unwrap() error { return f.error }

// usageError is the error of one that was not.
type usageError struct{ error }

// errTold says that what went wrong has been written already.
var errTold = errors.New("told")

// statusError is an answer that is told already, and an exit status of its own.
type statusError struct{ code int }

// Error is for callers that do not look at the code.
func (e *statusError) Error() string { return fmt.Sprintf("exit status %d", e.code) }

// Is has it be one of those that were told.
func (e *statusError) Is(err error) bool { return err == errTold }

func usage(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// markFailures has the errors of commands that run told from those of cobra, which are all about usage.
func markFailures(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		markFailures(sub)
	}
	run := cmd.RunE
	if run == nil {
		return
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		err := run(cmd, args)
		if _, ok := errors.AsType[*usageError](err); err == nil || ok {
			return err
		}
		return &failure{err}
	}
}

func exitCode(err error) int {
	if e, ok := errors.AsType[*statusError](err); ok {
		return e.code
	}
	if _, ok := errors.AsType[*failure](err); ok {
		return exitFailure
	}
	return exitUsage
}

// interrupted is a context that ends with the first SIGINT or SIGTERM; the second one ends the program at once.
func interrupted(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}
