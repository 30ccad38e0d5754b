package main

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/berth-run/berth/cmd/berth/internal/show"
	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/images/admin"
)

func (t *tool) imagesImport() *cobra.Command {
	var o images.ImportOptions
	cmd := &cobra.Command{
		Use: "import PATH", Short: "Import images from an archive, a directory or standard input",
		Long: "Import the images of an OCI layout (a tar file or a directory) or of a docker archive (docker save), compressed or not;\n" +
			"\"-\" is standard input. They are pinned, since a node without a registry does not get them back. All is verified as\n" +
			"a pull is, and nothing is left of an import that breaks off.",
		Example: "  berth images import app.tar\n" +
			"  berth images import --name registry.example/team/app:v1 layout/\n" +
			"  ssh other-node berth images export registry.example/team/app:v1 | berth images import -",
		Args: oneArg,
		RunE: func(cmd *cobra.Command, args []string) error {
			return t.call(cmd, func(ctx context.Context, c *admin.Client) error {
				in, size, err := openArchive(args[0], cmd.InOrStdin())
				if err != nil {
					return err
				}
				defer in.Close()
				sent := show.NewCounter(cmd.ErrOrStderr(), "sent", size)
				imported, err := c.Import(ctx, io.TeeReader(in, sent), o)
				sent.End()
				if err != nil {
					err = fmt.Errorf("%s: %w", file(args[0]), err)
				}
				if imported != nil {
					err = errors.Join(t.writeImported(cmd.OutOrStdout(), imported), err)
				}
				return err
			})
		},
	}
	cmd.Flags().StringSliceVar(&o.Names, "name", nil, "`reference` for the only image of the archive, in place of those in it")
	cmd.Flags().BoolVar(&o.Unpinned, "unpinned", false, "let the kubelet's garbage collection remove the images")
	return cmd
}

func (t *tool) writeImported(w io.Writer, in *admin.Imported) error {
	if t.output == asJSON {
		return writeJSON(w, in)
	}
	for _, img := range in.Images {
		names := strings.Join(img.RepoTags, " ")
		if names == "" {
			names = none
		}
		if _, err := fmt.Fprintf(w, "imported %s (%s)\n", show.Plain(names), img.ID); err != nil {
			return err
		}
	}
	return nil
}

// openArchive opens what is to be imported; a directory as a tar file of it. size is 0 where it is not known.
func openArchive(path string, stdin io.Reader) (archive io.ReadCloser, size int64, err error) {
	if path == "-" {
		return io.NopCloser(stdin), 0, nil
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, 0, err
	}
	if !info.IsDir() {
		f, err := os.Open(path)
		if info.Mode().IsRegular() {
			size = info.Size()
		}
		return f, size, err
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, 0, err
	}
	r, w := io.Pipe()
	go func() { // until all is read, or r is closed
		defer root.Close()
		tw := tar.NewWriter(w)
		w.CloseWithError(errors.Join(tw.AddFS(root.FS()), tw.Close()))
	}()
	return r, 0, nil
}

func (t *tool) imagesExport() *cobra.Command {
	var file, dir string
	cmd := &cobra.Command{
		Use: "export NAME...", Short: "Export images as an archive or a directory",
		Long: "Export images as a tar file that is an OCI layout and a docker archive in one: `berth images import`, `docker load`,\n" +
			"`podman load`, `ctr images import` and skopeo read it. Layers have the digests that they were pulled with where these\n" +
			"bytes can be made again; of others standard error says why not, and berth still imports them as the same image.",
		Example: "  berth images export --file app.tar registry.example/team/app:v1\n" +
			"  berth images export --dir layout registry.example/team/app:v1\n" +
			"  berth images export $(berth images list -q) | zstd > all.tar.zst",
		Args: someArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return t.call(cmd, func(ctx context.Context, c *admin.Client) error {
				var report *images.ExportReport
				export := func(w io.Writer) (err error) {
					written := show.NewCounter(cmd.ErrOrStderr(), "exported", 0)
					defer written.End()
					report, err = c.Export(ctx, io.MultiWriter(w, written), args...)
					return err
				}
				out, err := cmd.OutOrStdout(), error(nil)
				switch {
				case dir != "" && file != "":
					return usage("--file and --dir: give one of them")
				case dir != "":
					err = toDir(dir, export)
				case file != "":
					err = toFile(file, export)
				case show.IsTerminal(cmd.OutOrStdout()):
					return usage("an archive is nothing for a terminal: redirect standard output, or give --file or --dir")
				default:
					out = cmd.ErrOrStderr() // the archive is on standard output
					err = export(cmd.OutOrStdout())
				}
				if err != nil {
					return err
				}
				return t.writeExported(out, report)
			})
		},
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "write to a `file`, which is there only once it is whole")
	cmd.Flags().StringVarP(&dir, "dir", "d", "", "write an OCI layout to a `directory` that is new or empty")
	return cmd
}

func (t *tool) writeExported(w io.Writer, report *images.ExportReport) error {
	if t.output == asJSON {
		return json.NewEncoder(w).Encode(report)
	}
	for _, img := range report.Images {
		as := "as it was pulled"
		if !img.Exact() {
			as = "not byte for byte as it was pulled"
		}
		name := none
		if len(img.Names) > 0 {
			name = img.Names[0]
		}
		if _, err := fmt.Fprintf(w, "exported %s (%s), %s\n", show.Plain(name), img.ID, as); err != nil {
			return err
		}
		for _, l := range img.Layers {
			if l.Why == "" {
				continue
			}
			if _, err := fmt.Fprintf(w, "  layer %s is %s: %s\n", l.Digest, l.Exported, show.Plain(l.Why)); err != nil {
				return err
			}
		}
	}
	return nil
}

// toFile has a file written that is there only once it is whole. What is no regular file is written as it is.
func toFile(path string, write func(io.Writer) error) error {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(write(f), f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return notBeside(path, err)
	}
	if err := errors.Join(write(f), f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return os.Rename(f.Name(), path)
}

// notBeside is the error of making what is to become path, by that name and not by its own.
func notBeside(path string, err error) error {
	if failed, ok := errors.AsType[*os.PathError](err); ok {
		err = failed.Err
	}
	return fmt.Errorf("write %s: %w", path, err)
}

// toDir has a directory made of an archive, in the same manner.
func toDir(path string, write func(io.Writer) error) (err error) {
	path = filepath.Clean(path)
	if entries, err := os.ReadDir(path); err == nil && len(entries) > 0 {
		return fmt.Errorf("directory %s is not empty", path)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return notBeside(path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	r, w := io.Pipe()
	wrote := make(chan error, 1)
	go func() {
		err := write(w)
		w.CloseWithError(err)
		wrote <- err
	}()
	if err = untar(tmp, r); err == nil {
		_, err = io.Copy(io.Discard, r) // what a tar file has after its end
	}
	r.CloseWithError(err)
	if werr := <-wrote; werr != nil {
		return werr
	}
	if err != nil {
		return err
	}
	return os.Rename(tmp, path) // an empty directory that is there is replaced
}

// untar unpacks files and directories, and whatever the archive says, nothing outside of dir.
func untar(dir string, archive io.Reader) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for tr := tar.NewReader(archive); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := filepath.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = root.MkdirAll(name, 0o755)
		case tar.TypeReg:
			err = writeIn(root, name, tr)
		default:
			err = fmt.Errorf("%q is neither a file nor a directory", h.Name)
		}
		if err != nil {
			return err
		}
	}
}

func writeIn(root *os.Root, name string, content io.Reader) error {
	if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	return errors.Join(err, f.Close())
}

func (t *tool) imagesVerify() *cobra.Command {
	var v images.VerifyOptions
	cmd := &cobra.Command{
		Use: "verify", Short: "Find damaged images, and mend them",
		Long: "Compare the images with what they were when they were unpacked: names, kinds, sizes, times, owners, modes and\n" +
			"attributes; with --deep their contents, too. Images with a layer that is found damaged are not listed until they are\n" +
			"mended: by --repair, which fetches just those layers again, without credentials, or by the next pull.\n" +
			"Exit code 1 means that something is damaged and was not repaired.",
		Example: "  berth images verify\n  berth images verify --deep --repair",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			damaged, database := false, false
			ask := func(ctx context.Context, c *admin.Client) (*images.Report, error) {
				r, err := c.Verify(ctx, v)
				damaged = err == nil && r.Damaged()
				database = damaged && r.Findings[0].Kind == images.FoundDatabase
				return r, err
			}
			if err := answer(cmd, t, ask, t.writeReport); err != nil {
				return err
			}
			if database {
				return errors.New("the database is damaged: restart berth serve, which makes it anew of what can be read of it")
			}
			if damaged && v.Repair {
				return errors.New("something is still damaged, for the reasons above; a pull or an import of its image mends it, too")
			}
			if damaged {
				return errors.New("something is damaged: berth images verify --repair fetches it again, as does the next pull")
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&v.Deep, "deep", false, "read all contents")
	cmd.Flags().BoolVar(&v.Repair, "repair", false, "fetch damaged layers again, and drop records that lead nowhere")
	return cmd
}

func (t *tool) writeReport(w io.Writer, r *images.Report) error {
	for _, f := range r.Findings {
		line := f.String()
		switch {
		case f.Repaired:
			line += " (repaired)"
		case f.Error != "":
			line += " (not repaired: " + f.Error + ")"
		}
		if _, err := fmt.Fprintln(w, show.Plain(line)); err != nil {
			return err
		}
	}
	if r.Omitted > 0 {
		if _, err := fmt.Fprintf(w, "and %d more\n", r.Omitted); err != nil {
			return err
		}
	}
	if n := len(r.Unverifiable); n > 0 {
		if _, err := fmt.Fprintf(w, "%d layers were unpacked by an earlier version of berth and cannot be verified\n", n); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "%d images, %d layers, %s: %d findings\n", r.Images, r.Layers, show.Size(r.Bytes, t.exact), len(r.Findings))
	return err
}
