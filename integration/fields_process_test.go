//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/lab"
)

// processFields are about what a container's first process is, and how it is stopped.
func processFields() []fieldGroup {
	entry := func(name, about string, entrypoint, cmd, command, args []string, want string) fieldCase {
		return fieldCase{name, about, func(t *testing.T, f *fields) {
			image := f.image(t, func(i *imagestest.Image) { i.Config.Config.Entrypoint, i.Config.Config.Cmd = entrypoint, cmd })
			cfg := f.container(image, "")
			cfg.Command, cfg.Args = command, args
			if want == "" {
				f.refused(t, f.pod(t, plainPod), cfg, codes.InvalidArgument, "config.command")
				return
			}
			f.says(t, f.pod(t, plainPod), cfg, want)
		}}
	}
	const both = "ContainerConfig.command ContainerConfig.args"
	env := func(kv ...string) func(*runtimeapi.ContainerConfig) {
		return func(c *runtimeapi.ContainerConfig) {
			for i := 0; i < len(kv); i += 2 {
				c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: kv[i], Value: []byte(kv[i+1])})
			}
		}
	}
	const envs = "ContainerConfig.envs KeyValue.key KeyValue.value"
	return []fieldGroup{
		{"command", []fieldCase{
			entry("the image's entrypoint and command", both, []string{"echo", "e"}, []string{"c"}, nil, nil, "e c\n"),
			entry("args replace the image's command", both, []string{"echo", "e"}, []string{"c"}, nil, []string{"a"}, "e a\n"),
			entry("command replaces both", both, []string{"echo", "e"}, []string{"c"}, []string{"echo", "x"}, nil, "x\n"),
			entry("command and args", both, []string{"echo", "e"}, []string{"c"}, []string{"echo", "x"}, []string{"y", ""}, "x y \n"),
			entry("the image's command alone", both, nil, []string{"echo", "c"}, nil, nil, "c\n"),
			entry("args alone", both, nil, nil, nil, []string{"echo", "a"}, "a\n"),
			entry("nothing at all", both, nil, nil, nil, nil, ""),
			{"odd bytes in arguments", "ContainerConfig.args", func(t *testing.T, f *fields) {
				cfg := f.ctr("")
				cfg.Command, cfg.Args = []string{"printf", "[%s]"}, []string{"a b", "", "$HOME", "*", "\t", "ü", "'\"`"}
				f.says(t, f.pod(t, plainPod), cfg, "[a b][][$HOME][*][\t][ü]['\"`]")
			}},
			{"an argument as long as Linux takes", "ContainerConfig.args", func(t *testing.T, f *fields) {
				cfg := f.ctr("")
				cfg.Command, cfg.Args = []string{"sh", "-c", "echo ${#1}", "x"}, []string{strings.Repeat("a", 128<<10-1)}
				f.says(t, f.pod(t, plainPod), cfg, "131071\n")
			}},
			{"arguments of more than a megabyte", "ContainerConfig.args", func(t *testing.T, f *fields) {
				cfg := f.ctr("")
				cfg.Command = []string{"sh", "-c", "echo $#", "x"}
				for range 10 {
					cfg.Args = append(cfg.Args, strings.Repeat("a", 120<<10))
				}
				f.says(t, f.pod(t, plainPod), cfg, "10\n")
			}},
			{"a program that does not exist", "ContainerConfig.command", func(t *testing.T, f *fields) {
				cfg := f.ctr("")
				cfg.Command = []string{"/no/such/program"}
				p := f.pod(t, plainPod)
				id, err := f.CRI.Start(t.Context(), p.id, p.cfg, cfg)
				if id != "" {
					t.Cleanup(func() { f.remove(t, id) })
				}
				if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
					t.Errorf("error %v", err)
				}
			}},
		}},
		{"environment", []fieldCase{
			{"as given", envs, func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr("printf '[%s]' \"$A\" \"$B\" \"$EMPTY\"; test -n \"${EMPTY+set}\" && echo set", env("A", "1=2 3", "B", "x\ny", "EMPTY", "")), "[1=2 3][x\ny][]set\n")
			}},
			{"the last of two wins", envs, func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr("echo $A; env | grep -c ^A=", env("A", "1", "B", "x", "A", "2")), "2\n1\n")
			}},
			{"over the image's", envs, func(t *testing.T, f *fields) {
				image := f.image(t, func(i *imagestest.Image) { i.Config.Config.Env = append(i.Config.Config.Env, "A=image", "B=image") })
				cfg := f.ctr("echo $A $B", env("A", "request"))
				cfg.Image.Image = image
				f.says(t, f.pod(t, plainPod), cfg, "request image\n")
			}},
			{"PATH and HOSTNAME are there", envs, func(t *testing.T, f *fields) {
				if f.peer {
					t.Skip("containerd gives no PATH where the image has other variables")
				}
				image := f.security.image(t, nil)
				cfg := f.ctr("echo $PATH; echo $HOSTNAME; test -n \"$HOME\" && echo home; echo \"[$TERM]\"")
				cfg.Image.Image = image
				p := f.pod(t, plainPod)
				f.says(t, p, cfg, "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"+p.cfg.Hostname+"\nhome\n[]\n")
			}},
			{"PATH, HOME and HOSTNAME can be changed", envs, func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr("echo $PATH $HOME $HOSTNAME", env("PATH", "/x:/bin", "HOME", "/there", "HOSTNAME", "me")), "/x:/bin /there me\n")
			}},
			// The runtime specification is JSON, which has no such text: as on containerd, the replacement character stands for it.
			{"bytes that are no text", "KeyValue.value", func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr("printf %s \"$A\" | od -An -tx1; echo $B", env("A", "\xff\x01", "B", "whole")), " ef bf bd 01\nwhole\n")
			}},
			{"ten thousand variables", envs, func(t *testing.T, f *fields) {
				cfg := f.ctr("env | grep -c ^V")
				for i := range 10_000 {
					cfg.Envs = append(cfg.Envs, &runtimeapi.KeyValue{Key: fmt.Sprint("V", i), Value: []byte("x")})
				}
				f.says(t, f.pod(t, plainPod), cfg, "10000\n")
			}},
			{"an exec has it, too", envs, func(t *testing.T, f *fields) {
				id := f.start(t, f.pod(t, plainPod), f.idleWith(env("A", "1", "A", "2")))
				if out, code := f.exec(t, id, "echo $A $HOSTNAME"); code != 0 || out != "2 "+f.pod(t, plainPod).cfg.Hostname+"\n" {
					t.Errorf("exit code %d: %q", code, out)
				}
			}},
		}},
		{"directory", []fieldCase{
			{"given", "ContainerConfig.working_dir", func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr("pwd", func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "/usr/bin" }), "/usr/bin\n")
			}},
			{"made where it is missing", "ContainerConfig.working_dir", func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr("pwd; stat -c '%a %u' .", func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "/not/there/yet" }), "/not/there/yet\n755 0\n")
			}},
			{"with dots in it", "ContainerConfig.working_dir", func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr("pwd", func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "/usr/../etc/./" }), "/etc\n")
			}},
			{"the image's, else the root", "ContainerConfig.working_dir", func(t *testing.T, f *fields) {
				cfg := f.ctr("pwd")
				cfg.Image.Image = f.image(t, func(i *imagestest.Image) { i.Config.Config.WorkingDir = "/tmp" })
				f.says(t, f.pod(t, plainPod), cfg, "/tmp\n")
				f.says(t, f.pod(t, plainPod), f.ctr("pwd"), "/\n")
			}},
			{"a file in its place", "ContainerConfig.working_dir", func(t *testing.T, f *fields) {
				p := f.pod(t, plainPod)
				cfg := f.ctr("pwd", func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "/etc/passwd" })
				id, err := f.CRI.Start(t.Context(), p.id, p.cfg, cfg)
				if id != "" {
					t.Cleanup(func() { f.remove(t, id) })
				}
				if err == nil {
					t.Error("it starts")
				}
			}},
		}},
		{"stop signal", []fieldCase{
			stopsWith("SIGTERM unless somebody says otherwise", runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT, "", "TERM", runtimeapi.Signal_SIGNAL_SIGTERM),
			stopsWith("the request's", runtimeapi.Signal_SIGNAL_SIGUSR1, "", "USR1", runtimeapi.Signal_SIGNAL_SIGUSR1),
			stopsWith("the image's", runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT, "SIGUSR2", "USR2", runtimeapi.Signal_SIGNAL_SIGUSR2),
			stopsWith("the image's, a number", runtimeapi.Signal_SIGNAL_RUNTIME_DEFAULT, "3", "QUIT", runtimeapi.Signal_SIGNAL_SIGQUIT),
			stopsWith("the request's over the image's", runtimeapi.Signal_SIGNAL_SIGINT, "SIGUSR2", "INT", runtimeapi.Signal_SIGNAL_SIGINT),
			stopsWith("a real-time signal", runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3, "", "RTMIN+3", runtimeapi.Signal_SIGNAL_SIGRTMINPLUS3),
		}},
		{"names", []fieldCase{
			{"metadata of a container", "CreateContainerRequest.config CreateContainerRequest.pod_sandbox_id CreateContainerRequest.sandbox_config ContainerConfig.metadata ContainerMetadata.name ContainerMetadata.attempt", func(t *testing.T, f *fields) {
				cfg := f.idle("")
				cfg.Metadata.Attempt = 5
				p := f.pod(t, plainPod)
				id := f.start(t, p, cfg)
				list, err := f.CRI.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: id}})
				must(t, err)
				if st := f.status(t, id); st.Metadata.Name != cfg.Metadata.Name || st.Metadata.Attempt != 5 || len(list.Containers) != 1 || list.Containers[0].PodSandboxId != p.id || list.Containers[0].Metadata.Attempt != 5 {
					t.Errorf("status %v, listed %v", st.Metadata, list.Containers)
				}
			}},
			{"another attempt is another container", "ContainerMetadata.attempt", func(t *testing.T, f *fields) {
				first, second := f.idle(""), f.idle("")
				second.Metadata.Name, second.Metadata.Attempt = first.Metadata.Name, 1
				a, b := f.start(t, f.pod(t, plainPod), first), f.start(t, f.pod(t, plainPod), second)
				if a == b {
					t.Error("they are one")
				}
			}},
			{"log_path", "ContainerConfig.log_path", func(t *testing.T, f *fields) {
				p := f.pod(t, plainPod)
				cfg := f.ctr("echo out; echo err >&2")
				cfg.LogPath = "a/b/c.log"
				id := f.start(t, p, cfg)
				_, err := f.CRI.WaitExit(t.Context(), id, waitLong)
				must(t, err)
				want := filepath.Join(p.cfg.LogDirectory, "a/b/c.log")
				if st := f.status(t, id); st.LogPath != want {
					t.Errorf("status says %q", st.LogPath)
				}
				data, err := os.ReadFile(want)
				must(t, err)
				if text := string(data); !strings.Contains(text, " stdout F out\n") || !strings.Contains(text, " stderr F err\n") {
					t.Errorf("the log is %q", text)
				}
			}},
			{"no log_path, no log", "ContainerConfig.log_path", func(t *testing.T, f *fields) {
				cfg := f.ctr("yes | head -c 200000")
				cfg.LogPath = ""
				id := f.start(t, f.pod(t, plainPod), cfg)
				if st, err := f.CRI.WaitExit(t.Context(), id, waitLong); err != nil || st.ExitCode != 0 || st.LogPath != "" {
					t.Errorf("%v: %v", err, st)
				}
			}},
		}},
	}
}

// stopsWith is a case of a container that is stopped with a signal.
func stopsWith(name string, asked runtimeapi.Signal, image, trap string, told runtimeapi.Signal) fieldCase {
	return fieldCase{name, "ContainerConfig.stop_signal", func(t *testing.T, f *fields) {
		if f.peer && strings.HasPrefix(trap, "RT") {
			t.Skip("containerd has other names for these")
		}
		cfg := f.idle("")
		cfg.StopSignal = asked
		cfg.Command = []string{"sh", "-c", "trap 'echo got it; exit 7' " + trap + "; echo ready; while :; do sleep 1; done"}
		if image != "" {
			cfg.Image.Image = f.image(t, func(i *imagestest.Image) { i.Config.Config.StopSignal = image })
		}
		p := f.pod(t, plainPod)
		if strings.HasPrefix(trap, "RT") { // the shell of busybox has no names for them
			cfg.Command[2] = strings.Replace(cfg.Command[2], trap, "37", 1)
		}
		id := f.start(t, p, cfg)
		f.waitLog(t, p, cfg, "ready")
		if st := f.status(t, id); st.StopSignal != told {
			t.Errorf("status says %v, want %v", st.StopSignal, told)
		}
		_, err := f.CRI.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 60})
		must(t, err)
		if st := f.status(t, id); st.ExitCode != 7 {
			t.Errorf("exit code %d, log %q", st.ExitCode, f.log(t, p, cfg))
		}
	}}
}

// streamFields are about standard input and terminals.
func streamFields() []fieldGroup {
	type config = runtimeapi.ContainerConfig
	return []fieldGroup{{"streams", []fieldCase{
		{"no stdin is an ended one", "ContainerConfig.stdin", func(t *testing.T, f *fields) {
			f.says(t, f.pod(t, plainPod), f.ctr("cat; echo end"), "end\n")
		}},
		{"no tty", "ContainerConfig.tty", func(t *testing.T, f *fields) {
			f.says(t, f.pod(t, plainPod), f.ctr("test -t 0 || test -t 1 || test -t 2 || echo none"), "none\n")
		}},
		{"tty", "ContainerConfig.tty", func(t *testing.T, f *fields) {
			out := f.gives(t, f.pod(t, plainPod), f.ctr("test -t 0 && test -t 1 && test -t 2 && tty; echo $TERM; echo err >&2", func(c *config) { c.Tty = true }))
			if got := strings.ReplaceAll(out, "\r", ""); got != "/dev/pts/0\nxterm\nerr\n" && got != "/dev/console\nxterm\nerr\n" {
				t.Errorf("it says %q", out)
			}
		}},
		{"stdin stays open", "ContainerConfig.stdin ContainerConfig.stdin_once", func(t *testing.T, f *fields) {
			cfg := f.ctr("while read line; do echo got $line; done; echo end", func(c *config) { c.Stdin = true })
			p := f.pod(t, plainPod)
			id := f.start(t, p, cfg)
			for _, word := range []string{"one", "two"} {
				f.attach(t, id, word+"\n")
				f.waitLog(t, p, cfg, "got "+word+"\n")
			}
			if st := f.status(t, id); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
				t.Errorf("state %v, log %q", st.State, f.log(t, p, cfg))
			}
		}},
		{"stdin_once ends with the first to attach", "ContainerConfig.stdin ContainerConfig.stdin_once", func(t *testing.T, f *fields) {
			cfg := f.ctr("cat; echo end", func(c *config) { c.Stdin, c.StdinOnce = true, true })
			p := f.pod(t, plainPod)
			id := f.start(t, p, cfg)
			f.attach(t, id, "only this\n")
			st, err := f.CRI.WaitExit(t.Context(), id, waitLong)
			must(t, err)
			if text := f.log(t, p, cfg); st.ExitCode != 0 || text != "only this\nend\n" {
				t.Errorf("exit code %d, log %q", st.ExitCode, text)
			}
		}},
	}}}
}

// attach writes to a container's standard input and leaves. Whoever attaches to what goes on running is cut off: that it
// has arrived shows the container's log.
func (f *fields) attach(t *testing.T, id, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitLong)
	defer cancel()
	cmd := f.CrictlCommand(ctx, "attach", "-i", id)
	cmd.Stdin = strings.NewReader(text)
	done := make(chan error, 1)
	must(t, cmd.Start())
	go func() { done <- cmd.Wait() }()
	must(t, lab.Eventually(ctx, waitLong, "the container has read", func(context.Context) error {
		out, err := f.CRI.ContainerState(ctx, id)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(out.LogPath)
		if err == nil && !strings.Contains(string(data), strings.TrimSpace(text)) {
			return fmt.Errorf("the log is %q", data)
		}
		return err
	}))
	select {
	case <-done: //nolint:errcheck // only that it ended
	default:
		cancel()
		<-done //nolint:errcheck // only that it ended
	}
}
