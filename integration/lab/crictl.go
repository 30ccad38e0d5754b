package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Crictl runs crictl against the node's runtime and returns its standard output.
func (n *Node) Crictl(ctx context.Context, args ...string) (string, error) {
	cmd := n.CrictlCommand(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("crictl %s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	return out.String(), nil
}

// CrictlCommand is the command that Crictl runs, for tests that need its standard input or a part of its output.
func (n *Node) CrictlCommand(ctx context.Context, args ...string) *exec.Cmd {
	args = append([]string{"--config", filepath.Join(n.Dir, "crictl.yaml"), "-r", n.Endpoint, "-i", n.Endpoint, "-t", "60s"}, args...)
	return exec.CommandContext(ctx, n.Tools.Crictl, args...)
}

// Report counts the cases of a critest run.
type Report struct {
	Passed, Failed, Skipped int
	Failures                map[string]string // name of the case: what went wrong
	SkippedNames            []string
	Took                    time.Duration
}

// Critest runs the cases of critest whose names match focus and do not match skip (regular expressions). Cases that fail
// are in the report and no error.
func (n *Node) Critest(ctx context.Context, focus, skip string, args ...string) (*Report, error) {
	if n.Tools.Critest == "" {
		t, err := BuildTools(ctx, os.Stderr, "critest")
		if err != nil {
			return nil, err
		}
		n.Tools.Critest = t.Critest
	}
	dir, err := os.MkdirTemp(n.Dir, "critest-")
	if err != nil {
		return nil, err
	}
	report := filepath.Join(dir, "report.json")
	args = append([]string{
		"-runtime-endpoint", n.Endpoint, "-image-endpoint", n.Endpoint, "-ginkgo.json-report", report,
		"-ginkgo.no-color", "-ginkgo.succinct", "-ginkgo.focus", focus,
	}, args...)
	if skip != "" {
		args = append(args, "-ginkgo.skip", skip)
	}
	log, err := os.Create(filepath.Join(dir, "output"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.CommandContext(ctx, n.Tools.Critest, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	began := time.Now()
	runErr := cmd.Run() // failed cases make it fail: the report tells
	r, err := readReport(report)
	if err != nil {
		text, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("critest: %w (%w): %s", runErr, err, text[max(0, len(text)-2000):])
	}
	r.Took = time.Since(began)
	if runErr != nil && r.Failed == 0 {
		return r, fmt.Errorf("critest: %w", runErr)
	}
	return r, nil
}

// readReport reads the JSON report of ginkgo (types.Report).
func readReport(file string) (*Report, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var suites []struct {
		SpecReports []struct {
			ContainerHierarchyTexts []string
			LeafNodeText            string
			LeafNodeType            string
			State                   string
			Failure                 struct{ Message string }
		}
	}
	if err := json.Unmarshal(text, &suites); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	r := &Report{Failures: map[string]string{}}
	for _, suite := range suites {
		for _, spec := range suite.SpecReports {
			name := strings.TrimSpace(strings.Join(append(spec.ContainerHierarchyTexts, spec.LeafNodeText), " "))
			switch {
			case spec.State == "failed" || spec.State == "panicked" || spec.State == "timedout" || spec.State == "interrupted" || spec.State == "aborted":
				r.Failed++
				r.Failures[name] = spec.Failure.Message
			case spec.LeafNodeType != "It": // set-up and clean-up
			case spec.State == "passed":
				r.Passed++
			default:
				r.Skipped++
				r.SkippedNames = append(r.SkippedNames, name)
			}
		}
	}
	return r, nil
}
