package thread

import (
	"errors"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
)

func TestNeverTheMainThread(t *testing.T) {
	var mu sync.Mutex
	used := map[int]bool{}
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			err := Throwaway(func() error {
				mu.Lock()
				defer mu.Unlock()
				used[syscall.Gettid()] = true
				runtime.Gosched()
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if used[os.Getpid()] {
		t.Error("a function ran on the main thread")
	}
}

func TestErrorIsTheFunctions(t *testing.T) {
	want := errors.New("no")
	if err := Throwaway(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("%v", err)
	}
}
