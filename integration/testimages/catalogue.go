package testimages

import (
	"archive/tar"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Builder makes images and pushes them.
type Builder struct {
	Registry string                           // HOST:PORT, plain HTTP
	Busybox  string                           // a static busybox with all applets
	Work     string                           // an empty directory to work in
	Log      func(format string, args ...any) // one line for each image; may be nil

	packed map[packedLayer][]byte
}

func (b *Builder) logf(format string, args ...any) {
	if b.Log != nil {
		b.Log(format, args...)
	}
}

// Names under which the tests know the images; each is pulled through a mirror of its host.
const (
	Busybox = "registry.k8s.io/e2e-test-images/busybox:latest"
	Nginx   = "registry.k8s.io/e2e-test-images/nginx:latest"
	Httpd   = "registry.k8s.io/e2e-test-images/httpd:latest"
	Pause   = "registry.k8s.io/pause:latest"
)

const (
	passwd = `root:x:0:0:root:/root:/bin/sh
daemon:x:1:1::/:/bin/false
www-data:x:33:33::/var/www:/bin/false
nobody:x:65534:65534::/:/bin/false
default-user:x:1000:1000::/home:/bin/sh
`
	// users has a gid of its own choice, since critest asks only for the uid of "1003:users"; default-user is in a group
	// that only the image defines (KEP-3619, supplementalGroupsPolicy).
	group = `root:x:0:
daemon:x:1:
www-data:x:33:
users:x:100:
default-user:x:1000:
group-defined-in-image:x:50000:default-user
nogroup:x:65534:
`
	nginxConf = `daemon off;
pid /var/run/nginx.pid;
error_log /dev/stderr;
events {}
http {
  access_log /dev/stdout;
  client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;
  server { listen %[1]d; listen [::]:%[1]d; location / { root /srv; index index.html; } }
}
`
	pathEnv = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// busybox is the base layer: every applet a hard link, as in upstream's image.
func (b *Builder) busybox(ctx context.Context) ([]byte, error) {
	program, err := os.ReadFile(b.Busybox)
	if err != nil {
		return nil, err
	}
	applets, err := exec.CommandContext(ctx, b.Busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list: %w", b.Busybox, err)
	}
	var entries []Entry
	for _, dir := range strings.Fields("bin dev etc home proc root run sbin sys usr usr/bin usr/sbin var var/log var/www") {
		entries = append(entries, Dir(dir))
	}
	entries = append(entries,
		Entry{Name: "tmp", Type: tar.TypeDir, Mode: 0o777 | fs.ModeSticky},
		Program("bin/busybox", program),
		File("etc/passwd", passwd), File("etc/group", group), File("etc/nsswitch.conf", "hosts: files dns\n"))
	for _, applet := range strings.Fields(string(applets)) {
		if applet != "busybox" {
			entries = append(entries, Entry{Name: "bin/" + applet, Type: tar.TypeLink, Mode: 0o755, Link: "bin/busybox"})
		}
	}
	return Layer(entries...)
}

// PushAll pushes every image that critest and the tests of this module use.
func (b *Builder) PushAll(ctx context.Context) error {
	base, err := b.busybox(ctx)
	if err != nil {
		return fmt.Errorf("busybox layer: %w", err)
	}
	images, err := b.catalogue(ctx, base)
	if err != nil {
		return err
	}
	for _, im := range images {
		if _, err := b.Push(ctx, im); err != nil {
			return err
		}
	}
	return nil
}

func config(user string, cmd ...string) ocispec.ImageConfig {
	return ocispec.ImageConfig{Env: []string{pathEnv}, User: user, Cmd: cmd}
}

// catalogue lists the images. Names, tags and users are those of upstream (cri-tools pkg/framework and pkg/validate).
func (b *Builder) catalogue(ctx context.Context, base []byte) ([]Image, error) {
	pause, err := b.compile(ctx, pauseSource)
	if err != nil {
		return nil, fmt.Errorf("pause: %w", err)
	}
	nnp, err := b.compile(ctx, nnpSource)
	if err != nil {
		return nil, fmt.Errorf("nonewprivs: %w", err)
	}
	nginx, err := b.nginx(ctx)
	if err != nil {
		return nil, fmt.Errorf("nginx: %w", err)
	}
	var failed error
	layer := func(entries ...Entry) []byte {
		data, err := Layer(entries...)
		if err != nil && failed == nil {
			failed = err
		}
		return data
	}
	const tools, e2e = "k8s-staging-cri-tools/", "e2e-test-images/"
	images := []Image{
		{e2e + "busybox", []string{"1.29-2", "1.29-4", "1.36.1-1", "1.37.0-1", "1.37.0-2", "latest"}, [][]byte{base}, config("", "sh")},
		{"library/busybox", []string{"1.37", "latest"}, [][]byte{base}, config("", "sh")}, // the name in examples/crictl
		{e2e + "nonroot", []string{"1.5", "latest"}, [][]byte{base}, config("1234", "sh", "-c", "id -u; sleep 3600")},
		{
			"pause",
			[]string{"3.9", "3.10", "3.10.1", "3.10.2", "latest"},
			[][]byte{layer(Program("pause", pause))},
			ocispec.ImageConfig{Entrypoint: []string{"/pause"}, User: "65535:65535"},
		},
	}
	// mark is an image of its own: busybox and one small file.
	mark := func(repo, user, file, content string, tags ...string) {
		images = append(images, Image{tools + repo, tags, [][]byte{base, layer(File(file, content))}, config(user, "sh")})
	}
	mark("test-image-1", "", "test-image-1", "1", "latest")
	mark("test-image-2", "", "test-image-2", "2", "latest")
	mark("test-image-3", "", "test-image-3", "3", "latest")
	mark("test-image-latest", "", "latest", "latest", "latest")
	mark("test-image-tag", "", "tag", "test", "test")
	mark("test-image-tag", "", "tag", "all", "all")
	mark("test-image-digest", "", "digest", "digest", "test")
	mark("test-image-tags", "", "tags", "tags", "1", "2", "3")
	mark("test-image-user-uid", "1002", "user", "uid", "latest")
	mark("test-image-user-username", "www-data", "user", "username", "latest")
	mark("test-image-user-uid-group", "1003:users", "user", "uid-group", "latest")
	mark("test-image-user-username-group", "www-data:100", "user", "username-group", "latest")
	mark("test-image-predefined-group", "1000", "user", "predefined-group", "latest")

	setuid := Entry{Name: "nnp", Mode: 0o755 | fs.ModeSetuid, Data: nnp}
	privileges := config("")
	privileges.Entrypoint = []string{"/nnp"}
	images = append(images, Image{e2e + "nonewprivs", []string{"1.3", "1.4", "latest"}, [][]byte{base, layer(setuid)}, privileges})

	site := func(port int) []byte {
		return layer(
			File("etc/lab.conf", fmt.Sprintf(nginxConf, port)),
			File("srv/index.html", "<html><title>Welcome to nginx!</title>Welcome to nginx!</html>\n"),
			Dir("var/run"),
			Entry{Name: "var/log/nginx", Type: tar.TypeDir, Mode: 0o777},
			Entry{Name: "var/lib/nginx", Type: tar.TypeDir, Mode: 0o777})
	}
	serve := []string{"/usr/sbin/nginx", "-c", "/etc/lab.conf"}
	web := config("", serve...)
	web.ExposedPorts = map[string]struct{}{"80/tcp": {}}
	images = append(images,
		Image{e2e + "nginx", []string{"1.14-2", "1.14-4", "1.15-4", "1.27.0-2", "1.28.0-2", "latest"}, [][]byte{base, nginx, site(80)}, web},
		Image{tools + "hostnet-nginx-" + runtime.GOARCH, []string{"latest"}, [][]byte{base, nginx, site(12003)}, config("", serve...)})

	httpd := config("", "/bin/start-httpd")
	httpd.ExposedPorts = map[string]struct{}{"80/tcp": {}}
	images = append(images, Image{
		e2e + "httpd",
		[]string{"2.4.38-4", "2.4.39-4", "latest"},
		[][]byte{base, layer(
			File("srv/index.html", "<html><body><h1>It works!</h1></body></html>\n"),
			Program("bin/start-httpd", []byte("#!/bin/sh\necho httpd starting\nexec httpd -f -v -p 80 -h /srv\n")))},
		httpd,
	})
	return images, failed
}
