// Package kubeproxy asks kube-proxy's own proxier, in a process of its own, which rules it makes for a cluster and what these do with
// packets. The other side is in integration/tools/kubernetes/kubeproxy, where wire.go is compiled, too: so it talks of strings.
//
//	k, err := kubeproxy.Start(tools.KubeProxyTests)
//	answer, err := k.Ask(&kubeproxy.ClusterQuestion{...})
//
// It promises nothing about the kernel: the rules are in kube-proxy's fake of nf_tables, and packets are followed by the tracer of its
// tests.
package kubeproxy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
)

// Oracle is kube-proxy on a node. It is not safe for concurrent use.
type Oracle struct {
	cmd       *exec.Cmd
	questions *os.File
	answers   *os.File
	decoder   *json.Decoder
	printed   bytes.Buffer
}

// Start starts it in mode nftables, from the directory of kubeproxy.sh's programs.
func Start(dir string) (*Oracle, error) { return start(dir, "nftables") }

// StartIPTables starts it in mode iptables: it has rules, and follows no packets.
func StartIPTables(dir string) (*Oracle, error) { return start(dir, "iptables") }

func start(dir, mode string) (*Oracle, error) {
	inR, inW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, inR.Close(), inW.Close())
	}
	o := &Oracle{questions: inW, answers: outR, decoder: json.NewDecoder(outR)}
	o.cmd = exec.Command(filepath.Join(dir, mode), "-test.run", "^TestBerthOracle$", "-test.timeout", "0")
	o.cmd.Env = append(os.Environ(), "BERTH_ORACLE=1")
	o.cmd.ExtraFiles = []*os.File{inR, outW}
	o.cmd.Stdout, o.cmd.Stderr = &o.printed, io.Discard
	err = o.cmd.Start()
	if err := errors.Join(err, inR.Close(), outW.Close()); err != nil {
		return nil, errors.Join(err, inW.Close(), outR.Close())
	}
	return o, nil
}

// Ask asks one question. After an error it is of no use any more; Close says what it has printed.
func (o *Oracle) Ask(q *ClusterQuestion) (*ClusterAnswer, error) {
	if err := json.NewEncoder(o.questions).Encode(q); err != nil {
		return nil, fmt.Errorf("kube-proxy does not listen: %w", err)
	}
	var a ClusterAnswer
	if err := o.decoder.Decode(&a); err != nil {
		return nil, fmt.Errorf("kube-proxy does not answer: %w", err)
	}
	if a.Error != "" || len(a.Fates) != len(q.Packets) {
		return nil, fmt.Errorf("kube-proxy: %s; %d answers for %d packets", a.Error, len(a.Fates), len(q.Packets))
	}
	return &a, nil
}

// Close ends it. An error is its own, with what it has printed.
func (o *Oracle) Close() error {
	err := o.questions.Close()
	if bad := o.cmd.Wait(); bad != nil {
		err = errors.Join(err, fmt.Errorf("kube-proxy: %w\n%s", bad, &o.printed))
	}
	return errors.Join(err, o.answers.Close())
}

// ConfigOf is a configuration of the proxy's model, whose fields have the same names: its tests ask as well, so that it cannot be imported.
func ConfigOf(model any) (ProxyConfig, error) {
	var c ProxyConfig
	text, err := json.Marshal(model)
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(text, &c)
}

// String is all of a fate but the rules, in a line; endpoints are sorted.
func (f *PacketFate) String() string {
	list := make([]string, len(f.Endpoints))
	for i, e := range f.Endpoints {
		list[i] = e.Endpoint
		if e.Masquerade {
			list[i] += " masq"
		}
	}
	slices.Sort(list)
	return fmt.Sprintf("%s %v affinity %d", f.Action, list, f.Affinity)
}
