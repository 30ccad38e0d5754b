package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/containernetworking/cni/pkg/invoke"
)

// checked looks at what plugins answer to ADD before libcni does: that says of an empty answer that JSON has ended, and
// panics where a list of an older version has a null in it.
type checked struct{ invoke.Exec }

// ExecPlugin runs a plugin.
func (c checked) ExecPlugin(ctx context.Context, program string, stdin []byte, environ []string) ([]byte, error) {
	out, err := c.Exec.ExecPlugin(ctx, program, stdin, environ)
	switch command := variable(environ, "CNI_COMMAND"); {
	case err == nil && command == "ADD":
		err = checkResult(out)
	case err != nil && command == "STATUS": // of other commands libcni says whose they are
		err = fmt.Errorf("plugin type=%q is not ready: %w", typeOf(program), err)
	}
	return out, err
}

// checkResult says why what a plugin has answered, which says that all went well, is no result.
func checkResult(answer []byte) error {
	if len(answer) == 0 {
		return errors.New("it claims success, and gives no result")
	}
	var r struct {
		Interfaces, IPs, Routes []json.RawMessage
		IP4, IP6                struct{ Routes []json.RawMessage }
	}
	if err := json.Unmarshal(answer, &r); err != nil {
		return fmt.Errorf("it claims success, and its result is none: %w%s", err, said("stdout", answer))
	}
	for _, list := range [][]json.RawMessage{r.Interfaces, r.IPs, r.Routes, r.IP4.Routes, r.IP6.Routes} {
		if slices.ContainsFunc(list, func(m json.RawMessage) bool { return string(m) == "null" }) {
			return fmt.Errorf("its result has a null in a list%s", said("stdout", answer))
		}
	}
	return nil
}
