package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/spf13/cobra"

	"github.com/berth-run/berth/cmd/berth/internal/show"
	"github.com/berth-run/berth/images/admin"
)

func imagesCommand() *cobra.Command {
	t := &tool{}
	return t.group("images", "Look after the images of this node",
		"Look after the images of this node, through the running daemon: the same store that the kubelet uses.\n"+
			"Exit code: 0, 1 if it failed, 2 if the command line makes no sense.",
		t.imagesList(), t.imagesInspect(), t.imagesPull(), t.imagesPulls(), t.imagesRemove(), t.imagesPin(true), t.imagesPin(false),
		t.imagesImport(), t.imagesExport(), t.imagesVerify(), t.imagesUsage())
}

func (t *tool) imagesList() *cobra.Command {
	var quiet, whole, digests bool
	cmd := &cobra.Command{
		Use: "list [NAME...]", Aliases: []string{"ls"}, Short: "List images",
		Long: "List images; with NAMEs, those of which a tag or digest contains one, or whose id begins with one. SIZE is what an\n" +
			"image takes on disk, what it shares included; crictl images shows what was fetched of it, which is compressed.",
		Example: "  berth images list\n" +
			"  berth images list coredns\n" +
			"  berth images list --output json | jq -r '.images[] | select(.pinned) | .id'",
		RunE: func(cmd *cobra.Command, args []string) error {
			ask := func(ctx context.Context, c *admin.Client) (*admin.List, error) {
				list, err := c.Images(ctx)
				if err != nil {
					return nil, err
				}
				return &admin.List{Images: named(list.Images, args)}, nil
			}
			return answer(cmd, t, ask, func(w io.Writer, list *admin.List) error {
				if quiet {
					for _, img := range list.Images {
						if _, err := fmt.Fprintln(w, img.ID); err != nil {
							return err
						}
					}
					return nil
				}
				head := []string{"IMAGE", "TAG", "IMAGE ID", "SIZE", "PINNED"}
				if digests {
					head = []string{"IMAGE", "TAG", "DIGEST", "IMAGE ID", "SIZE", "PINNED"}
				}
				return show.Table(w, head, t.listRows(list.Images, whole, digests))
			})
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "ids only")
	cmd.Flags().BoolVar(&whole, "no-trunc", false, "whole ids and digests")
	cmd.Flags().BoolVar(&digests, "digests", false, "show the digests they were pulled by")
	return cmd
}

// named picks images by name; all of them where there is none.
func named(list []admin.Image, names []string) []admin.Image {
	if len(names) == 0 {
		return list
	}
	picked := []admin.Image{}
	for _, img := range list {
		for _, name := range names {
			text := strings.Join(append(append([]string{}, img.RepoTags...), img.RepoDigests...), "\n")
			if strings.Contains(text, name) || strings.HasPrefix(img.ID.String(), name) || strings.HasPrefix(img.ID.Encoded(), name) {
				picked = append(picked, img)
				break
			}
		}
	}
	return picked
}

const none = "<none>"

// listRows are a row for each tag, and one for an image without any.
func (t *tool) listRows(list []admin.Image, whole, digests bool) [][]string {
	var rows [][]string
	for _, img := range list {
		byRepo := map[string]string{}
		for _, ref := range img.RepoDigests {
			repo, digest, _ := strings.Cut(ref, "@")
			byRepo[repo] = shortID(digest, whole)
		}
		row := func(repo, tag string) {
			cells := []string{repo, tag}
			if digests {
				digest := byRepo[repo]
				if digest == "" {
					digest = none
				}
				cells = append(cells, digest)
			}
			pinned := "no"
			if img.Pinned {
				pinned = "yes"
			}
			rows = append(rows, append(cells, shortID(img.ID.String(), whole), show.Size(img.Unpacked, t.exact), pinned))
		}
		for _, ref := range img.RepoTags {
			row(splitTag(ref))
		}
		if len(img.RepoTags) > 0 {
			continue
		}
		if len(byRepo) == 0 {
			row(none, none)
		}
		for _, ref := range img.RepoDigests {
			repo, _, _ := strings.Cut(ref, "@")
			row(repo, none)
		}
	}
	return rows
}

func splitTag(ref string) (repo, tag string) {
	named, err := reference.ParseNormalizedNamed(ref)
	if tagged, ok := named.(reference.Tagged); err == nil && ok {
		return reference.TrimNamed(named).Name(), tagged.Tag()
	}
	return ref, none
}

// shortID is a digest as crictl shows it: its first 13 digits.
func shortID(d string, whole bool) string {
	_, hex, ok := strings.Cut(d, ":")
	if whole || !ok || len(hex) < 13 {
		return d
	}
	return hex[:13]
}

func (t *tool) imagesInspect() *cobra.Command {
	return &cobra.Command{
		Use: "inspect NAME", Short: "Show all that is known of an image",
		Long: "Show all that is known of an image, by a reference, its id or the beginning of that: names, layers, who uses it.\n" +
			"With --output json its whole configuration, too.",
		Example: "  berth images inspect registry.k8s.io/coredns/coredns:v1.12.0\n" +
			"  berth images inspect --output json 3f57d9401f8d | jq .config.config.Entrypoint",
		Args: oneArg,
		RunE: func(cmd *cobra.Command, args []string) error {
			ask := func(ctx context.Context, c *admin.Client) (*admin.Detail, error) { return c.Inspect(ctx, args[0]) }
			return answer(cmd, t, ask, t.writeDetail)
		},
	}
}

func (t *tool) writeDetail(w io.Writer, d *admin.Detail) error {
	created := "unknown"
	if d.Created != nil {
		created = d.Created.UTC().Format(time.RFC3339)
	}
	var rows [][]string
	add := func(name string, values ...string) {
		name += ":"
		for _, v := range values {
			if v == "" { // not said by the image
				continue
			}
			rows = append(rows, []string{name, v})
			name = ""
		}
	}
	add("ID", d.ID.String())
	add("Tags", d.RepoTags...)
	add("Digests", d.RepoDigests...)
	add("Platform", d.Platform)
	add("Created", created)
	add("Pinned", fmt.Sprint(d.Pinned))
	add("Fetched", show.Size(d.Compressed, t.exact))
	add("On disk", show.Size(d.Unpacked, t.exact)+", of which no other image has "+show.Size(d.Unique, t.exact))
	add("Containers", d.Containers...)
	add("Volumes", d.Volumes...)
	if d.Artifact != "" {
		add("Artifact", d.Artifact)
	}
	add("User", d.Config.Config.User)
	add("Entrypoint", strings.Join(d.Config.Config.Entrypoint, " "))
	add("Command", strings.Join(d.Config.Config.Cmd, " "))
	if err := show.Rows(w, rows); err != nil {
		return err
	}
	rows = nil
	for i, l := range d.Layers {
		rows = append(rows, []string{fmt.Sprint(i + 1), l.DiffID.String(), show.Size(l.Bytes, t.exact), fmt.Sprint(l.Inodes), fmt.Sprint(l.Images)})
	}
	if _, err := fmt.Fprintln(w); err != nil {
		return err
	}
	return show.Table(w, []string{"LAYER", "DIFF ID", "SIZE", "FILES", "IMAGES"}, rows)
}

func (t *tool) imagesRemove() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "remove NAME...", Aliases: []string{"rm"}, Short: "Remove images",
		Long: "Remove images, with all their tags. One that a container is made of, or that is pinned, stays unless it is forced.",
		Example: "  berth images remove docker.io/library/busybox:1.36\n" +
			"  berth images remove --force 3f57d9401f8d",
		Args: someArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return outcomes(cmd, t, "removed", func(ctx context.Context, c *admin.Client) (*admin.Removal, []admin.Outcome, error) {
				answer, err := c.Remove(ctx, force, args...)
				if err != nil {
					return nil, nil, err
				}
				return answer, answer.Removed, nil
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also what is pinned or in use; layers that containers need stay until these are gone")
	return cmd
}

// imagesPin is the command that pins images, or the one that unpins them.
func (t *tool) imagesPin(pinned bool) *cobra.Command {
	cmd := &cobra.Command{
		Use: "pin NAME...", Short: "Keep images from the kubelet's garbage collection",
		Long: "Keep images from the kubelet's garbage collection, as imported ones are: for nodes that do not get them back. What is\n" +
			"pinned is not removed without --force, and waits for a pull or an import, however long, where it is damaged.",
		Example: "  berth images pin registry.k8s.io/coredns/coredns:v1.12.0",
		Args:    someArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return outcomes(cmd, t, cmd.Name()+"ned", func(ctx context.Context, c *admin.Client) (*admin.Pinned, []admin.Outcome, error) {
				answer, err := c.Pin(ctx, pinned, args...)
				if err != nil {
					return nil, nil, err
				}
				return answer, answer.Images, nil
			})
		},
	}
	if !pinned {
		cmd.Use, cmd.Short = "unpin NAME...", "Leave images to the kubelet's garbage collection"
		cmd.Long = "Leave images to the kubelet's garbage collection, also imported ones. Pause images, which other runtimes cannot do\nwithout, are always pinned."
		cmd.Example = "  berth images unpin $(berth images list -q coredns)"
	}
	return cmd
}

// outcomes asks the daemon to do something to images, and shows a line for each: what was done, or, on standard error, why it
// was not.
func outcomes[T any](cmd *cobra.Command, t *tool, done string, ask func(context.Context, *admin.Client) (T, []admin.Outcome, error)) error {
	var all []admin.Outcome
	failed := false
	err := answer(cmd, t, func(ctx context.Context, c *admin.Client) (v T, err error) {
		v, all, err = ask(ctx, c)
		for _, o := range all {
			if o.Error != nil {
				failed = true
				if t.output == asText {
					fmt.Fprintln(cmd.ErrOrStderr(), "berth:", show.Plain(o.Error.Text))
				}
			}
		}
		return v, err
	}, func(w io.Writer, _ T) error {
		for _, o := range all {
			if o.Error != nil {
				continue
			}
			if _, err := fmt.Fprintf(w, "%s %s (%s)\n", done, o.Name, o.ID); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil && failed {
		return errTold
	}
	return err
}

func (t *tool) imagesUsage() *cobra.Command {
	return &cobra.Command{
		Use: "du", Short: "Show what the images take on disk",
		Long: "Show what the images take on disk, as it was counted when they were unpacked, and what containers have written, as\n" +
			"last counted. SHARED is what other images have, too; FREEABLE goes when all images go that are neither in use nor pinned.",
		Example: "  berth images du\n  berth images du --output json | jq .freeableBytes",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return answer(cmd, t, func(ctx context.Context, c *admin.Client) (*admin.Usage, error) { return c.Usage(ctx) }, t.writeUsage)
		},
	}
}

func (t *tool) writeUsage(w io.Writer, u *admin.Usage) error {
	var rows [][]string
	for _, img := range u.Images {
		name := none
		if refs := append(append([]string{}, img.RepoTags...), img.RepoDigests...); len(refs) > 0 {
			name = refs[0]
		}
		rows = append(rows, []string{
			name, shortID(img.ID.String(), false), show.Size(img.Unpacked, t.exact), show.Size(img.Unpacked-img.Unique, t.exact),
			show.Size(img.Unique, t.exact), fmt.Sprint(len(img.Containers) + len(img.Volumes)),
		})
	}
	if err := show.Table(w, []string{"IMAGE", "IMAGE ID", "SIZE", "SHARED", "UNIQUE", "USERS"}, rows); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(w); err != nil {
		return err
	}
	return show.Rows(w, [][]string{
		{"Images:", fmt.Sprintf("%d of %d layers: %s, %d files, in %s", len(u.Images), u.Layers, show.Size(u.Bytes, t.exact), u.Inodes, u.Root)},
		{"Freeable:", show.Size(u.Freeable, t.exact)},
		{"Containers:", fmt.Sprintf("%d have written %s, in %s", u.Containers, show.Size(u.WritableBytes, t.exact), u.WritableRoot)},
	})
}
