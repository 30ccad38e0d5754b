package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/berth-run/berth/cmd/berth/internal/show"
	"github.com/berth-run/berth/images/admin"
)

func (t *tool) imagesPull() *cobra.Command {
	var (
		l     login
		quiet bool
	)
	cmd := &cobra.Command{
		Use: "pull IMAGE", Short: "Pull an image",
		Long: "Pull an image. Ctrl-C ends it, unless a kubelet waits for the same pull. How far it has come goes to standard error:\n" +
			"bars on a terminal, else lines; the image's id to standard output. With --output json both are lines of JSON there.",
		Example: "  berth images pull registry.k8s.io/pause:3.10\n" +
			"  berth images pull --docker-config ~/.docker/config.json registry.example/team/app:v1\n" +
			"  pass show registry | berth images pull --creds-file - registry.example/team/app:v1",
		Args: oneArg,
		RunE: func(cmd *cobra.Command, args []string) error {
			auth, _, err := l.read(cmd.InOrStdin(), args[0])
			if err != nil {
				return err
			}
			return t.call(cmd, func(ctx context.Context, c *admin.Client) error {
				out := json.NewEncoder(cmd.OutOrStdout())
				update, end := func(*admin.Pull) {}, func() {}
				switch {
				case quiet:
				case t.output == asJSON:
					update = func(p *admin.Pull) { _ = out.Encode(admin.Event{Progress: p}) }
				default:
					p := show.NewProgress(cmd.ErrOrStderr())
					update, end = p.Update, p.End
				}
				img, err := c.Pull(ctx, admin.Reference{Image: args[0], Auth: auth}, update)
				end()
				if err != nil {
					return err
				}
				if t.output == asJSON {
					return out.Encode(admin.Event{Image: img})
				}
				if !quiet {
					fmt.Fprintf(cmd.ErrOrStderr(), "%s: pulled, %s on disk\n", show.Plain(args[0]), show.Size(img.Unpacked, t.exact))
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), img.ID)
				return err
			})
		},
	}
	l.flags(cmd)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

func (t *tool) imagesPulls() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use: "pulls", Short: "Show the pulls under way",
		Long:    "Show the pulls under way, those of the kubelet included. The metrics of the daemon count them, too, and its log tells\nevery ten seconds how far each has come.",
		Example: "  berth images pulls\n  berth images pulls --watch\n  berth images pulls --watch --output json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !watch {
				return answer(cmd, t, func(ctx context.Context, c *admin.Client) (*admin.Pulls, error) { return c.Pulls(ctx) }, t.writePulls)
			}
			return t.call(cmd, func(ctx context.Context, c *admin.Client) error {
				err := c.WatchPulls(ctx, func(p *admin.Pulls) error {
					if t.output == asJSON {
						return json.NewEncoder(cmd.OutOrStdout()).Encode(p)
					}
					return t.writePulls(cmd.OutOrStdout(), p)
				})
				if ctx.Err() != nil {
					return nil // it is how one stops watching
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "at every change, until interrupted")
	return cmd
}

func (t *tool) writePulls(w io.Writer, p *admin.Pulls) error {
	var rows [][]string
	for _, pull := range p.Pulls {
		done := 0
		for _, l := range pull.Layers {
			if l.State.Here() {
				done++
			}
		}
		rows = append(rows, []string{
			pull.Reference, string(pull.State), fmt.Sprintf("%d/%d", done, len(pull.Layers)),
			show.Size(pull.Fetched, t.exact), show.Size(pull.Total, t.exact), time.Since(pull.Started).Round(time.Second).String(),
		})
	}
	return show.Table(w, []string{"IMAGE", "STATE", "LAYERS", "FETCHED", "OF", "FOR"}, rows)
}
