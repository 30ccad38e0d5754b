//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
)

// up leads from any directory to the root.
var up = strings.Repeat("../", 24)

// A WORKDIR that is a descriptor of init leads out of the container, if one is open there.
func (s *security) TestCVE_2024_21626_WorkdirInProcSelfFd(t *testing.T) {
	p := s.pod(t, plainPod)
	escape := "cat " + up + s.sentinel.Dir + "/tool"
	for n := 3; n <= 64; n++ {
		ctr := s.container("", escape)
		ctr.WorkingDir = fmt.Sprintf("/proc/self/fd/%d", n)
		if out, code, err := s.output(t, p, ctr); err == nil && code == 0 {
			t.Errorf("WORKDIR %s is the host's: %s", ctr.WorkingDir, out)
		}
	}
	// An exec starts in the container's own directory, where a link may have been put meanwhile.
	volume := s.volume(t)
	work := filepath.Join(volume, "work")
	must(t, os.Mkdir(work, 0o755))
	ctr := s.idle("")
	ctr.Mounts, ctr.WorkingDir = []*runtimeapi.Mount{bindMount(volume, "/volume")}, "/volume/work"
	id := s.start(t, p, ctr)
	if out, code := s.exec(t, id, "pwd"); code != 0 || out != "/volume/work\n" {
		t.Fatalf("exec before the attack: %q, exit code %d", out, code)
	}
	for n := 3; n <= 64; n++ {
		must(t, os.Remove(work))
		must(t, os.Symlink(fmt.Sprintf("/proc/self/fd/%d", n), work))
		resp, err := s.CRI.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", escape}, Timeout: 30})
		if err == nil && resp.ExitCode == 0 {
			t.Errorf("an exec in /proc/self/fd/%d is on the host: %s", n, resp.Stdout)
		}
	}
}

// A directory that becomes a link between the check and the mount leads the mount to the host.
func (s *security) TestCVE_2021_30465_MountTargetSwappedForLink(t *testing.T) {
	p := s.pod(t, plainPod)
	volume, other := s.volume(t), s.volume(t)
	dir, link := filepath.Join(volume, "a"), filepath.Join(volume, "link")
	must(t, os.MkdirAll(dir, 0o755))
	must(t, os.Symlink(up+strings.TrimPrefix(s.sentinel.Dir, "/"), link))
	stop := make(chan struct{})
	var swapping sync.WaitGroup
	swaps := 0
	swapping.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE); err != nil {
				t.Errorf("swap: %v", err)
				return
			}
			swaps++
			time.Sleep(100 * time.Microsecond) // any faster, and every lookup in a root starts again, on the whole machine
		}
	})
	created := 0
	const creations, enough = 200, 50
	tries := 0
	for end := time.Now().Add(30 * time.Second); tries < enough || tries < creations && time.Now().Before(end); tries++ {
		ctr := s.container("", "true")
		ctr.Mounts = []*runtimeapi.Mount{bindMount(volume, "/volume"), bindMount(other, "/volume/a/b"), bindMount(filepath.Join(s.Dir, "resolv.conf"), "/volume/a/tool")}
		if tries%2 == 1 { // the mount point of a file, and one directory deeper
			ctr.Mounts[1].ContainerPath = "/volume/a/b/c"
		}
		id, err := s.CRI.Create(t.Context(), p.id, p.cfg, ctr)
		if err == nil {
			created++
			s.remove(t, id)
		}
	}
	close(stop)
	swapping.Wait()
	if created == 0 || swaps < tries {
		t.Errorf("%d creations of %d succeeded during %d swaps: the attack did not take place", created, tries, swaps)
	}
	t.Logf("%d of %d creations succeeded, %d swaps", created, tries, swaps)
}

// With /proc or /sys a link or a volume, what should be written there, or mounted over, is elsewhere.
func (s *security) TestCVE_2019_16884_ProcAndSysReplaced(t *testing.T) {
	p := s.pod(t, plainPod)
	const check = "stat -f -c %T /proc /sys; cat /proc/1/comm"
	for _, name := range []string{"proc", "sys"} {
		image := s.image(t, nil, imagestest.Dir("x"), imagestest.Dir("x/self"), imagestest.Symlink(name, "/x"))
		if out, code, err := s.output(t, p, s.container(image, check)); err == nil {
			t.Errorf("/%s is a link to /x: runs, exit code %d: %s", name, code, out)
		}
		volume := s.volume(t)
		must(t, os.MkdirAll(filepath.Join(volume, "self", "attr"), 0o755))
		if name == "proc" {
			ctr := s.container("", check)
			ctr.Mounts = []*runtimeapi.Mount{bindMount(volume, "/proc")}
			if out, code, err := s.output(t, p, ctr); err == nil {
				t.Errorf("a volume on /proc: runs, exit code %d: %s", code, out)
			}
		}
	}
	for _, volume := range []string{"/proc", "proc/self/attr", "/x/../proc/", "/"} {
		image := s.image(t, func(i *imagestest.Image) { i.Config.Config.Volumes = map[string]struct{}{volume: {}} })
		out, _, err := s.output(t, p, s.container(image, "true"))
		wantCode(t, err, codes.InvalidArgument, "VOLUME", volume)
		if err == nil {
			t.Errorf("VOLUME %s: runs: %s", volume, out)
		}
	}
	// VOLUME of an image mounts nothing in berth, so that it cannot be in the place of /sys.
	image := s.image(t, func(i *imagestest.Image) { i.Config.Config.Volumes = map[string]struct{}{"/sys": {}} })
	out, code, err := s.output(t, p, s.container(image, "cat /proc/1/comm; ls /proc/sys/kernel/ostype /sys/kernel"))
	if err != nil || code != 0 || !strings.HasPrefix(out, "sh\n") {
		t.Errorf("VOLUME /sys: %v, exit code %d: %s", err, code, out)
	}
}

// Masking by a bind of /dev/null mounts what the container put into its place.
func (s *security) TestCVE_2025_31133_DevNullReplaced(t *testing.T) {
	p := s.pod(t, plainPod)
	must(t, os.WriteFile(filepath.Join(s.Dir, "secret"), []byte("host secret"), 0o600))
	for name, prepare := range map[string]func(dev string) error{
		"link to the host": func(dev string) error { return os.Symlink(s.Dir+"/secret", filepath.Join(dev, "null")) },
		"link up":          func(dev string) error { return os.Symlink(up+s.Dir+"/secret", filepath.Join(dev, "null")) },
		"link to procfs":   func(dev string) error { return os.Symlink("/proc/sysrq-trigger", filepath.Join(dev, "null")) },
		"file":             func(dev string) error { return os.WriteFile(filepath.Join(dev, "null"), []byte("host secret"), 0o644) },
		"directory":        func(dev string) error { return os.Mkdir(filepath.Join(dev, "null"), 0o755) },
		"nothing":          func(string) error { return nil },
		"fifo":             func(dev string) error { return unix.Mkfifo(filepath.Join(dev, "null"), 0o666) },
		"other device": func(dev string) error {
			return unix.Mknod(filepath.Join(dev, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 8)))
		},
		"link into proc fd": func(dev string) error { return os.Symlink("/proc/self/fd/3", filepath.Join(dev, "null")) },
	} {
		t.Run(name, func(t *testing.T) {
			dev := s.volume(t)
			must(t, prepare(dev))
			ctr := s.container("", "cat /proc/timer_list | head -c 4096; echo; echo x > /proc/sysrq-trigger")
			ctr.Mounts = []*runtimeapi.Mount{bindMount(dev, "/dev")}
			out, _, err := s.output(t, p, ctr)
			if err != nil {
				return // refused
			}
			if strings.Contains(out, "host secret") || strings.Contains(out, "Timer List") {
				t.Errorf("masked files say: %.200s", out)
			}
			if !strings.Contains(out, "Read-only file system") && !strings.Contains(out, "can't create") {
				t.Errorf("/proc/sysrq-trigger was written: %.200s", out)
			}
		})
	}
	// In an image, all of /dev is below berth's own.
	image := s.image(t, nil, imagestest.Dir("dev"), imagestest.Symlink("dev/null", "/proc/sysrq-trigger"))
	out, code, err := s.output(t, p, s.container(image, "cat /dev/null /proc/timer_list; stat -c %t:%T /dev/null"))
	if err != nil || code != 0 || out != "1:3\n" {
		t.Errorf("image with a link at /dev/null: %v, exit code %d: %s", err, code, out)
	}
}

// The console is bound onto what the container put at /dev/console, its slave opened below what it put at /dev/pts.
func (s *security) TestCVE_2025_52565_ConsoleElsewhere(t *testing.T) {
	p := s.pod(t, plainPod)
	target := s.sentinel.Dir + "/etc/passwd"
	for name, prepare := range map[string]func(dev string) error{
		"console is a link":    func(dev string) error { return os.Symlink(target, filepath.Join(dev, "console")) },
		"console is a link up": func(dev string) error { return os.Symlink(up+target, filepath.Join(dev, "console")) },
		"console is procfs": func(dev string) error {
			return os.Symlink("/proc/sys/kernel/core_pattern", filepath.Join(dev, "console"))
		},
		"console is a directory": func(dev string) error { return os.Mkdir(filepath.Join(dev, "console"), 0o755) },
		"pts is a link":          func(dev string) error { return os.Symlink(filepath.Dir(target), filepath.Join(dev, "pts")) },
		"pts/0 is a link": func(dev string) error {
			if err := os.Mkdir(filepath.Join(dev, "pts"), 0o755); err != nil {
				return err
			}
			return os.Symlink(target, filepath.Join(dev, "pts/0"))
		},
		"ptmx is a link": func(dev string) error { return os.Symlink(target, filepath.Join(dev, "ptmx")) },
	} {
		t.Run(name, func(t *testing.T) {
			dev := s.volume(t)
			must(t, prepare(dev))
			ctr := s.container("", "echo written > /dev/console; echo to the terminal")
			ctr.Tty, ctr.Mounts = true, []*runtimeapi.Mount{bindMount(dev, "/dev")}
			out, _, err := s.output(t, p, ctr)
			if err == nil && strings.Contains(out, "sentinel") {
				t.Errorf("terminal shows the host: %s", out)
			}
			s.sentinel.Check(t)
			s.noMountOutside(t)
		})
	}
	image := s.image(t, nil, imagestest.Dir("dev"), imagestest.Symlink("dev/console", target), imagestest.Symlink("dev/pts", s.sentinel.Dir), imagestest.Symlink("dev/ptmx", target))
	ctr := s.container(image, "echo written > /dev/console")
	ctr.Tty = true
	if out, code, err := s.output(t, p, ctr); err != nil || code != 0 || !strings.Contains(out, "written") {
		t.Errorf("image with odd devices: %v, exit code %d: %s", err, code, out)
	}
}

// A mount over a part of procfs has the runtime's own writes go elsewhere.
func (s *security) TestCVE_2025_52881_ProcfsWritesRedirected(t *testing.T) {
	p := s.pod(t, plainPod)
	volume := s.volume(t)
	must(t, os.WriteFile(filepath.Join(volume, "exec"), nil, 0o666))
	for _, at := range []string{"/proc/self/attr", "/proc/self", "/proc/thread-self/attr", "/proc/sys", "/proc/sys/net", "/proc/1", "/proc/../proc/self/attr", "//proc/sys/kernel"} {
		ctr := s.container("", "true")
		ctr.Mounts = []*runtimeapi.Mount{bindMount(volume, at)}
		if out, code, err := s.output(t, p, ctr); err == nil {
			t.Errorf("a volume on %s: runs, exit code %d: %s", at, code, out)
		}
	}
	// Sysctls of the pod are in its namespaces and nowhere else.
	const name = "/proc/sys/net/ipv4/ip_default_ttl"
	before, err := os.ReadFile(name)
	must(t, err)
	cfg := s.podConfig(plainPod)
	cfg.Linux.Sysctls = map[string]string{"net.ipv4.ip_default_ttl": "33", "kernel.shmmni": "1234", "fs.mqueue.msg_max": "77"}
	own := s.ownPod(t, cfg)
	out, _, err := s.output(t, own, s.container("", "cat "+name+" /proc/sys/kernel/shmmni /proc/sys/fs/mqueue/msg_max"))
	if err != nil || out != "33\n1234\n77\n" {
		t.Errorf("sysctls inside: %q, %v", out, err)
	}
	for path, not := range map[string]string{name: "33", "/proc/sys/kernel/shmmni": "1234", "/proc/sys/fs/mqueue/msg_max": "77"} {
		if now, err := os.ReadFile(path); err != nil || strings.TrimSpace(string(now)) == not {
			t.Errorf("%s of the host is %s, was %s (%v)", path, now, before, err)
		}
	}
}

// Device nodes and links of /dev are made on the host.
func (s *security) TestCVE_2026_41579_DevIsALink(t *testing.T) {
	p := s.pod(t, plainPod)
	for _, to := range []string{s.sentinel.Dir + "/dir", up + s.sentinel.Dir + "/dir", "../../../../sentinel/dir", "../../tmp/x", "/proc/self/cwd/..", "."} {
		image := s.image(t, nil, imagestest.Symlink("dev", to))
		out, code, err := s.output(t, p, s.container(image, "stat -c %t:%T /dev/null"))
		if err == nil && (code != 0 || out != "1:3\n") {
			t.Errorf("/dev -> %s: exit code %d: %s", to, code, out)
		}
		// With a volume at /dev berth mounts none of its own, and the nodes are the volume's affair.
		volume := s.volume(t)
		must(t, os.Symlink(to, filepath.Join(volume, "dev")))
		ctr := s.container("", "true")
		ctr.Mounts = []*runtimeapi.Mount{bindMount(volume, "/volume"), bindMount(volume, "/dev")}
		_, _, _ = s.output(t, p, ctr)
		s.sentinel.Check(t)
	}
}

// Files of /etc, working directories and mount points are made through links of the image.
func (s *security) TestCVE_2024_5154_FilesThroughLinks(t *testing.T) {
	p := s.pod(t, plainPod)
	target := s.sentinel.Dir
	for name, entries := range map[string][]imagestest.Entry{
		"/etc absolute":       {imagestest.Symlink("etc", target)},
		"/etc up":             {imagestest.Symlink("etc", up+target)},
		"/etc beside":         {imagestest.Symlink("etc", "../../../../sentinel")},
		"/etc/mtab":           {imagestest.Symlink("etc/mtab", target+"/dir/file")},
		"/etc/hosts":          {imagestest.Symlink("etc/hosts", target+"/etc/passwd"), imagestest.Symlink("etc/resolv.conf", up+target+"/new")},
		"working directory":   {imagestest.Symlink("work", target)},
		"working directory 2": {imagestest.Symlink("work", up+target)},
		"chain":               {imagestest.Symlink("a", "b"), imagestest.Symlink("b", up+target), imagestest.Symlink("work", "a/dir")},
	} {
		t.Run(name, func(t *testing.T) {
			image := s.image(t, nil, entries...)
			ctr := s.container(image, "cat "+up+s.sentinel.Dir+"/tool")
			ctr.WorkingDir = "/work/made/deep"
			ctr.Mounts = []*runtimeapi.Mount{bindMount(s.volume(t), "/work/mounted"), bindMount(filepath.Join(s.Dir, "resolv.conf"), "/work/etc/shadow")}
			if out, code, err := s.output(t, p, ctr); err == nil && code == 0 {
				t.Errorf("runs in the host's tree: %s", out)
			}
			s.sentinel.Check(t)
			s.noMountOutside(t)
		})
	}
}

// The runtime copies what is at the place of an image's VOLUME, from the host.
func (s *security) TestCVE_2022_23648_VolumesCopyHostFiles(t *testing.T) {
	p := s.pod(t, plainPod)
	volumes := map[string]struct{}{"/../../etc": {}, up + s.sentinel.Dir: {}, "/vol": {}, s.sentinel.Dir: {}}
	image := s.image(t, func(i *imagestest.Image) { i.Config.Config.Volumes = volumes },
		imagestest.Symlink("vol", up+s.sentinel.Dir), imagestest.Symlink("etc/link", "/etc/shadow"))
	out, _, err := s.output(t, p, s.container(image, "cat /vol/etc/shadow /etc/shadow /etc/link "+s.sentinel.Dir+"/tool; ls /vol/ /etc"))
	must(t, err)
	if strings.Contains(out, "sentinel ") || strings.Contains(out, "root:") || !strings.Contains(out, "passwd") {
		t.Errorf("the container sees: %s", out)
	}
}

// A file of the host that is mounted in the place of one that the runtime labels gets the label. Where SELinux is off, not
// even one that is to be relabelled.
func (s *security) TestCVE_2021_43816_NoRelabelOfSystemFiles(t *testing.T) {
	p := s.pod(t, plainPod)
	ctr := s.container("", "cat /etc/hosts /etc/hostname")
	ctr.Mounts = []*runtimeapi.Mount{bindMount(s.sentinel.Dir+"/etc/passwd", "/etc/hosts"), bindMount(s.sentinel.Dir+"/tool", "/etc/hostname")}
	for _, m := range ctr.Mounts {
		m.SelinuxRelabel, m.Readonly = !seLinux(), true
	}
	out, code, err := s.output(t, p, ctr)
	if err != nil || code != 0 || out != "sentinel etc/passwdsentinel tool\n" && out != "sentinel etc/passwdsentinel tool" {
		t.Errorf("%v, exit code %d: %q", err, code, out)
	}
	s.sentinel.Check(t) // with all extended attributes
}

// A huge path, or 10,000 id mappings, overflow the message to libcontainer's bootstrap.
func (s *security) TestCVE_2021_43784_HugeRequests(t *testing.T) {
	p := s.pod(t, plainPod)
	long := "/" + strings.Repeat(strings.Repeat("x", 200)+"/", 350)
	maps := make([]*runtimeapi.IDMapping, 10000)
	for i := range maps {
		maps[i] = &runtimeapi.IDMapping{HostId: uint32(i), ContainerId: uint32(i), Length: 1}
	}
	for name, change := range map[string]func(*runtimeapi.ContainerConfig){
		"working directory": func(c *runtimeapi.ContainerConfig) { c.WorkingDir = long },
		"mount point":       func(c *runtimeapi.ContainerConfig) { c.Mounts = []*runtimeapi.Mount{bindMount(s.Dir, long)} },
		"masked path":       func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.MaskedPaths = []string{long} },
		"mappings": func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: maps, Gids: maps}
		},
		"mappings of a mount": func(c *runtimeapi.ContainerConfig) {
			m := bindMount(s.Dir, "/x")
			m.UidMappings, m.GidMappings = maps, maps
			c.Mounts = []*runtimeapi.Mount{m}
		},
	} {
		ctr := s.container("", "true")
		change(ctr)
		_, _, err := s.output(t, p, ctr)
		if err == nil || len(err.Error()) > 2000 {
			t.Errorf("%s: %.3000v", name, err)
		}
	}
	if out, code, err := s.output(t, p, s.container("", "echo works")); err != nil || code != 0 || out != "works\n" {
		t.Errorf("the pod afterwards: %v, exit code %d: %s", err, code, out)
	}
	cfg := s.podConfig(plainPod)
	cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: maps, Gids: maps}
	if id, err := s.CRI.RunPod(t.Context(), cfg); err == nil {
		t.Errorf("pod %s runs", id)
	}
}

// Names of the mount points in a container come from the request, too: nothing of them reaches the host.
func (s *security) TestMountPointsThatLookUp(t *testing.T) {
	p := s.pod(t, plainPod)
	for _, at := range []string{up + s.sentinel.Dir + "/dir/new", "/" + up + s.sentinel.Dir + "/dir", "/tmp/" + up + s.sentinel.Dir + "/new", "relative", "", "/", "/a\nb"} {
		ctr := s.container("", "true")
		ctr.Mounts = []*runtimeapi.Mount{bindMount(s.volume(t), at)}
		_, _, err := s.output(t, p, ctr)
		if !strings.HasPrefix(at, "/") || at == "/" || strings.Contains(at, "\n") {
			wantCode(t, err, codes.InvalidArgument, "config.mounts[0].container_path")
		}
		s.sentinel.Check(t)
	}
}
