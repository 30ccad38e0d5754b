package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/berth-run/berth/cmd/berth/internal/credentials"
	"github.com/berth-run/berth/cmd/berth/internal/show"
	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/images/admin"
)

func registryCommand() *cobra.Command {
	t := &tool{}
	return t.group("registry", "Look into how registries are reached",
		"Look into how registries are reached, through the running daemon.\n"+
			"Exit code: 0, 1 if it failed, 2 if the command line makes no sense.",
		t.registryExplain())
}

// login is where the credentials of a call are from.
type login struct {
	pair, docker string
}

func (l *login) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&l.pair, "creds-file", "", "`file` with one line USER:PASSWORD, \"-\" for standard input; for the image's own registry, no mirror gets them")
	cmd.Flags().StringVar(&l.docker, "docker-config", "", "`file` in the format of Docker's config.json, \"-\" for standard input")
	cmd.MarkFlagsMutuallyExclusive("creds-file", "docker-config")
}

// read returns the credentials for an image, nil for none, and says in words where they are from.
func (l *login) read(in io.Reader, image string) (*admin.Auth, string, error) {
	switch {
	case l.pair != "":
		auth, err := credentials.Pair(l.pair, in)
		return auth, "from " + file(l.pair), err
	case l.docker != "":
		auth, entry, err := credentials.Docker(l.docker, in, image)
		if auth == nil {
			return nil, "none: " + file(l.docker) + " has none for it", err
		}
		return auth, fmt.Sprintf("from %s, entry %q", file(l.docker), entry), err
	}
	return nil, "none given (--creds-file, --docker-config)", nil
}

func file(name string) string {
	if name == "-" {
		return "standard input"
	}
	return name
}

// explained is what explain tells.
type explained struct {
	*images.Explanation
	Credentials string `json:"credentials"`
}

func (t *tool) registryExplain() *cobra.Command {
	var l login
	cmd := &cobra.Command{
		Use: "explain IMAGE", Short: "Say where a pull of an image would ask, why there, and what is answered",
		Long: "Say which hosts a pull of an image would ask, in order, in which file and line each is configured, which credentials\n" +
			"it would get, and what each answers now. The manifest alone is asked for; nothing is fetched. It fails if no host\n" +
			"answers with the image.",
		Example: "  berth registry explain registry.k8s.io/pause:3.10\n" +
			"  berth registry explain --docker-config ~/.docker/config.json registry.example/team/app:v1\n" +
			"  pass show registry | berth registry explain --creds-file - registry.example/team/app:v1",
		Args: oneArg,
		RunE: func(cmd *cobra.Command, args []string) error {
			auth, from, err := l.read(cmd.InOrStdin(), args[0])
			if err != nil {
				return err
			}
			has := false
			ask := func(ctx context.Context, c *admin.Client) (*explained, error) {
				e, err := c.Explain(ctx, admin.Reference{Image: args[0], Auth: auth})
				if err != nil {
					return nil, err
				}
				for _, h := range e.Hosts {
					has = has || h.OK
				}
				return &explained{e, from}, nil
			}
			if err := answer(cmd, t, ask, writeExplanation); err != nil {
				return err
			}
			if !has {
				return fmt.Errorf("no host answers with %s", args[0])
			}
			return nil
		},
	}
	l.flags(cmd)
	return cmd
}

func writeExplanation(w io.Writer, e *explained) error {
	rows := [][]string{{"Image:", e.Reference}, {"Looked in:", orNone(e.Searched)}, {"Credentials:", e.Credentials}}
	for _, n := range e.Notes {
		rows = append(rows, []string{"Note:", n})
	}
	if err := show.Rows(w, rows); err != nil {
		return err
	}
	for i, h := range e.Hosts {
		at := h.File
		if h.Line > 0 {
			at = fmt.Sprintf("%s:%d", h.File, h.Line)
		}
		if at != "" {
			at = " (" + at + ")"
		}
		rows := [][]string{
			{"  why:", h.Why + at},
			{"  asked for:", strings.Join(h.Capabilities, ", ")},
		}
		for _, s := range h.Settings {
			rows = append(rows, []string{"  setting:", s})
		}
		if h.Proxy != "" {
			rows = append(rows, []string{"  proxy:", h.Proxy})
		}
		rows = append(rows, []string{"  credentials:", h.Credentials})
		if len(h.TokenServers) > 0 {
			rows = append(rows, []string{"  token servers:", strings.Join(h.TokenServers, ", ")})
		}
		for _, r := range h.Requests {
			rows = append(rows, []string{"  asked:", r})
		}
		rows = append(rows, []string{"  answer:", h.Answer})
		if _, err := fmt.Fprintf(w, "\n%d. %s\n", i+1, show.Plain(h.URL)); err != nil {
			return err
		}
		if err := show.Rows(w, rows); err != nil {
			return err
		}
	}
	return nil
}

func orNone(s string) string {
	if s == "" {
		return "nowhere"
	}
	return s
}
