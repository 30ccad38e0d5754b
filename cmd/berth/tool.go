package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/berth-run/berth/cmd/berth/internal/config"
	"github.com/berth-run/berth/images/admin"
)

// tool is what the commands that ask a running daemon have in common.
type tool struct {
	address, run string
	output       string
	exact        bool // sizes in bytes
}

// Formats of output.
const (
	asText = "text"
	asJSON = "json"
)

// group makes a command of subcommands that ask the daemon.
func (t *tool) group(use, short, long string, subs ...*cobra.Command) *cobra.Command {
	names := make([]string, len(subs))
	for i, sub := range subs {
		names[i] = sub.Name()
	}
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usage("%s: say which: %s", cmd.Name(), strings.Join(names, ", "))
		},
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if formats := []string{asText, asJSON}; !slices.Contains(formats, t.output) {
				return usage("--output: %q is none of %s", t.output, strings.Join(formats, ", "))
			}
			return nil
		},
	}
	f := cmd.PersistentFlags()
	f.StringVar(&t.address, "address", "", "the daemon's admin socket `path` (default admin/admin.sock in --run)")
	f.StringVar(&t.run, "run", "", "the daemon's run `directory` (default that of its configuration in "+configDir+", else "+config.Default().Run+")")
	f.StringVarP(&t.output, "output", "o", asText, "`format`: text or json; what takes long tells its progress as lines of JSON then")
	f.BoolVar(&t.exact, "bytes", false, "show sizes in bytes")
	cmd.AddCommand(subs...)
	return cmd
}

// oneArg and someArgs are about the argument that the usage line names.
func oneArg(cmd *cobra.Command, args []string) error {
	if len(args) > 1 {
		return fmt.Errorf("takes one %s, and has %d: %q", argument(cmd), len(args), args)
	}
	return someArgs(cmd, args)
}

func someArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("%s is missing", argument(cmd))
	}
	return nil
}

// argument is what the usage line calls a command's argument.
func argument(cmd *cobra.Command) string {
	_, name, _ := strings.Cut(cmd.Use, " ")
	return strings.TrimSuffix(name, "...")
}

// client finds the daemon as it was configured.
func (t *tool) client() (*admin.Client, error) {
	if t.address != "" {
		return admin.NewClient(t.address), nil
	}
	files, err := config.Files("", configDir)
	if err != nil {
		return nil, err
	}
	c, err := config.Load(files, config.Config{Run: t.run}, func(name string) bool { return name == "run" && t.run != "" })
	if err != nil {
		return nil, fmt.Errorf("where is the daemon? Name its socket with --address: %w", err)
	}
	return admin.NewClient(c.AdminSocket()), nil
}

// call has f ask the daemon, until it is done or interrupted.
func (t *tool) call(cmd *cobra.Command, f func(context.Context, *admin.Client) error) error {
	c, err := t.client()
	if err != nil {
		return err
	}
	ctx, stop := interrupted(cmd.Context())
	defer stop()
	return f(ctx, c)
}

// answer asks the daemon for one thing and shows it.
func answer[T any](cmd *cobra.Command, t *tool, ask func(context.Context, *admin.Client) (T, error), text func(io.Writer, T) error) error {
	return t.call(cmd, func(ctx context.Context, c *admin.Client) error {
		v, err := ask(ctx, c)
		if err != nil {
			return err
		}
		if t.output == asJSON {
			return writeJSON(cmd.OutOrStdout(), v)
		}
		return text(cmd.OutOrStdout(), v)
	})
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
